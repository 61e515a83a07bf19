"""The quality benchmark's parts: tiers and their cells, runs, result files, statistics, plots."""
