"""Measurements that are run by hand: each is a script with its own `--help`."""
