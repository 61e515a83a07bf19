"""Parts of benchmarks/communication.py: what the processes measure, and the cost model over it."""
