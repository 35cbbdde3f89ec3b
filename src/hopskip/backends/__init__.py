"""Decoders behind one contract (`base.py`): C++ for CPUs, the PyTorch reference, CUDA."""
