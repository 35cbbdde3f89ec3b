"""Decoding at static shapes: whole rounds of draft and verify that never wait for the host, fit for a CUDA graph."""
