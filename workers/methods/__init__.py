"""The merge methods: one file each, with its parameters, its arithmetic and its source."""

from __future__ import annotations

from mmerge.workers.methods.registry import find_method, method_names, register_method

__all__ = ["find_method", "method_names", "register_method"]
