"""The C++ engine: packed weights, every row near the price of none, bits that depend on nothing else."""
