"""Parts of scripts/classify_images.py."""
