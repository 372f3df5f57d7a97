"""Prompts, processors and encoders."""
