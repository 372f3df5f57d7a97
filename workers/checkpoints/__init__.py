"""Inputs: checkpoints, LoRA adapters, block readers."""
