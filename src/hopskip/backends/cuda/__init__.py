"""Kernels and graph capture for the CUDA backend to come. Nothing reaches this folder yet."""
