"""Scoring composites and calibrating recipes."""
