"""What a load read, and the tensors that a composite loaded beside it may share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

from mmerge.workers.composite.weight_items import Item, ItemReader


@dataclass(frozen=True)
class LoadReport:
    """What one rank read from the store, how long its load took, and the memory of its process."""

    rank: int
    bytes_read: int
    seconds: float
    start_bytes: int = 0
    """Resident memory before the first weight was read: Python, torch, transformers, kernels.

    0 where the system does not say.
    """
    peak_bytes: int = 0
    """Peak of the resident memory until the model was loaded (VmHWM)."""


class LoadedItems:
    """The items of a language model as they were placed, by what they are made of.

    The tensors are those of the model, not copies; nothing writes to them.
    """

    def __init__(self, device: torch.device) -> None:
        """Hold the items of a model whose tensors are on one device."""
        self.device = device
        self._fields: dict[Hashable, Mapping[str, torch.Tensor]] = {}

    def keep(self, item: Item, fields: Mapping[str, torch.Tensor], *, reader: ItemReader) -> None:
        """Note the fields of an item that was placed."""
        self._fields[_identify(item, reader)] = fields

    def find(self, item: Item, *, reader: ItemReader) -> dict[str, torch.Tensor] | None:
        """Return the fields of an equal item, None if there is none."""
        fields = self._fields.get(_identify(item, reader))
        return None if fields is None else dict(fields)


def _identify(item: Item, reader: ItemReader) -> Hashable:
    """Return all that the fields of an item depend on: stored bytes, roles, dtypes, rescalers."""
    build = reader.reader
    owners = build.expert_names
    digests = [("", role, build.digests(item.name, role)) for role in ("base", "merged", "delta")]
    for owner in owners:
        for role in ("mask", "extra_rows", "carried"):
            digests.append((owner, role, build.digests(item.name, role, owner)))
    rescalers = tuple(build.rescaler(owner) for owner in owners)
    copied = reader.copied_digests(item.name)
    return item, reader.expert, tuple(digests), rescalers, copied
