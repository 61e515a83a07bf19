"""Parts of scripts/detect_objects.py."""
