"""Sparse layers that are faster than dense ones on a CPU. `gap_hf.optimize_for_inference` is the way in."""
