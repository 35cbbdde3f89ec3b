"""Proofs and measurements: `hopskip check`, `hopskip bench`."""
