"""The pieces of scripts/segment_points.py that its tests use too."""
