"""Proofs on a model of the user's own that speculation changes nothing: `hopskip check`."""
