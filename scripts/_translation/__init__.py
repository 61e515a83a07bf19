"""The pieces of scripts/translate.py that its tests and other scripts use too."""
