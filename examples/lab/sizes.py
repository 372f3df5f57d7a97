"""Sizes and training schedules of the lab's models.

LAB_SIZE is small (committed, for a CPU) or large (for a GPU).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Size:
    """One size of the laboratory. Rates are AdamW's peak learning rates."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    encoder_hidden: int
    encoder_mlp: int
    encoder_layers: int
    lora_rank: int
    batch: int
    expert_batch: int
    base_steps: int
    base_rate: float
    whole_steps: int
    whole_rate: float
    encoder_steps: Mapping[str, int]
    encoder_rate: float
    expert_steps: Mapping[str, int]
    expert_rate: Mapping[str, float]
    connector_rate: float
    new_steps: int
    new_rate: float
    twin_steps: Mapping[str, int]
    twin_rate: float
    pool: int


def _each(image: float, audio: float, video: float, point: float) -> Mapping[str, Any]:
    return MappingProxyType({"image": image, "audio": audio, "video": video, "point": point})


SIZES = MappingProxyType(
    {
        "small": Size(
            hidden=128,
            mlp=256,
            layers=4,
            heads=4,
            kv_heads=2,
            encoder_hidden=64,
            encoder_mlp=192,
            encoder_layers=2,
            lora_rank=16,
            batch=32,
            expert_batch=16,
            base_steps=1500,
            base_rate=2e-3,
            whole_steps=450,
            whole_rate=1e-3,
            encoder_steps=_each(2000, 500, 1500, 1000),
            encoder_rate=2e-3,
            expert_steps=_each(300, 200, 700, 250),
            expert_rate=_each(2e-4, 2e-4, 3e-4, 2e-4),
            connector_rate=2e-3,
            new_steps=100,
            new_rate=3e-4,
            twin_steps=_each(120, 120, 140, 120),
            twin_rate=2e-3,
            pool=8000,
        ),
        "large": Size(
            hidden=1024,
            mlp=2816,
            layers=12,
            heads=16,
            kv_heads=8,
            encoder_hidden=256,
            encoder_mlp=1024,
            encoder_layers=4,
            lora_rank=64,
            batch=128,
            expert_batch=64,
            base_steps=6000,
            base_rate=4e-4,
            whole_steps=2000,
            whole_rate=2e-4,
            encoder_steps=_each(4000, 2000, 4000, 4000),
            encoder_rate=1e-3,
            expert_steps=_each(2000, 2000, 3000, 2000),
            expert_rate=_each(3e-5, 3e-5, 5e-5, 3e-5),
            connector_rate=5e-4,
            new_steps=500,
            new_rate=5e-5,
            twin_steps=_each(1500, 1500, 2000, 1500),
            twin_rate=5e-4,
            pool=60_000,
        ),
    }
)


def read_size() -> tuple[str, Size]:
    """Return the size that LAB_SIZE names, and its name; `small` by default.

    Raises SystemExit for another name.
    """
    name = os.environ.get("LAB_SIZE", "small")
    if name not in SIZES:
        raise SystemExit(f"LAB_SIZE is {name!r}; choose one of {', '.join(SIZES)}")
    return name, SIZES[name]
