"""Models on disk: finding them, their configuration, their tensors, trained exits."""
