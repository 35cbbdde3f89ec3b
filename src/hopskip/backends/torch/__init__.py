"""The reference in PyTorch: readable, and the path for devices without an engine of their own."""
