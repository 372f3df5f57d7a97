"""Numba and Triton loops over raw memory; no Python objects."""
