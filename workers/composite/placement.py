"""Placement of a composite: the layers and the bytes of each device."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from mmerge.manifests.errors import PlacementError
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.composite.routed_linear import Policy
from mmerge.workers.families.registry import is_before_layers

By = Literal["tensor", "layers"]
"""`tensor` divides every matrix over all devices; `layers` gives each device a range of layers."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device."""

    weights: int = 0
    """Weights of text tokens, embedding, head and norms; in retention mode the expert's."""
    task_vector: int = 0
    masks: int = 0
    modalities: int = 0
    """Weights of every modality (policy `resident`), and adapters."""
    encoders: int = 0
    kv_cache: int = 0
    workspace: int = 0
    """Activations of a prefill of the whole context, logits, and one block of weights."""
    reserve: int = 0
    """For the driver's context, gaps of the allocator and buffers of libraries."""

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, addend: DeviceMemory) -> DeviceMemory:
        """Return the sums, field by field."""
        names = [field.name for field in fields(self)]
        return DeviceMemory(*(getattr(self, name) + getattr(addend, name) for name in names))


@dataclass(frozen=True)
class Stage:
    """One device: its layers and its memory. In tensor parallelism it has parts of all layers."""

    device: str
    capacity: int
    memory: DeviceMemory
    first_layer: int
    last_layer: int
    num_layers: int

    def holds(self, name: str) -> bool:
        """Return whether this stage has a language-model tensor.

        The embedding belongs to the first stage, norm and head to the last.
        """
        layer = layer_of(name)
        if layer is not None:
            return self.first_layer <= layer <= self.last_layer
        if is_before_layers(name):
            return self.first_layer == 0
        return self.last_layer == self.num_layers - 1


@dataclass(frozen=True)
class Placement:
    """A composite over devices."""

    by: By
    policy: Policy
    context: int
    batch: int
    stages: tuple[Stage, ...]

    @property
    def num_ranks(self) -> int:
        """Processes of it: one per device in tensor parallelism, one in all by layers."""
        return len(self.stages) if self.by == "tensor" else 1

    @property
    def fits(self) -> bool:
        """Whether every device has enough memory."""
        return all(stage.memory.total <= stage.capacity for stage in self.stages)


def parse_devices(text: str) -> list[int]:
    """Return the memory of each device in bytes, from `4x80`, `80` or `2x80,1x40` (GB, 10⁹ bytes).

    Raises:
        PlacementError: the text has another form.
    """
    sizes: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(
            r"(?:([0-9]{1,9})[x×])?([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:GB)?", part, re.IGNORECASE
        )
        if not match or float(match[2]) <= 0 or not 0 < int(match[1] or 1) <= 1024:
            raise PlacementError(
                f"{text!r}: expected devices as COUNTxGB, such as 4x80 or 2x80,2x40"
            )
        sizes += [round(float(match[2]) * 1e9)] * int(match[1] or 1)
    return sizes
