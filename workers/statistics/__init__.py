"""Exact sums and order statistics."""
