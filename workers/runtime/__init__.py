"""Cores, host memory and deferred imports."""
