"""Ordinary checkpoints and LoRA adapters written from a build."""
