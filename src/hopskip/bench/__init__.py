"""Measurements: contenders side by side, load tests, perplexity, replays of traces."""
