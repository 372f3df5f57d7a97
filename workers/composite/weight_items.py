"""Items of a load: the tensors of a language model, and how each is read from a build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mmerge.workers.composite.routed_linear import Policy, RoutedWeights
from mmerge.workers.reconstruction.bitmask import pack_rows
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_read import read_masked_weight
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

Kind = Literal["plain", "matrix", "bias"]


@dataclass(frozen=True)
class Field:
    """One of the tensors of an item; `shape` is that of the whole tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A language-model tensor to load: a plain one, or the matrix or bias of a RoutedLinear."""

    name: str
    kind: Kind
    fields: tuple[Field, ...]
    num_bytes: int
    """Bytes read from the store for it, by one rank."""


class ItemReader:
    """Reads the language model of a build: of text and all modalities, or of one expert."""

    def __init__(
        self, reader: BuildReader, *, expert: str | None, dtype: torch.dtype, policy: Policy
    ) -> None:
        self.reader, self.expert = reader, expert
        self.dtype, self.policy = dtype, policy
        self._has_routes = expert is None and reader.manifest.kind == "masks"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a language-model tensor as it is loaded."""
        reader = self.reader
        copied = self._copied_name(name)
        if copied is not None and self.expert:
            return reader.shape(copied, "carried", self.expert)
        shape = reader.shape(name, "merged" if reader.has(name, "merged") else "base")
        if self.expert and reader.has(name, "extra_rows", self.expert):
            return (shape[0] + reader.shape(name, "extra_rows", self.expert)[0], *shape[1:])
        return shape

    def is_routed(self, name: str) -> bool:
        """Return whether a tensor is weight or bias of a Linear layer with weights per modality."""
        path, _, kind = name.rpartition(".")
        weight = f"{path}.weight"
        if not self._has_routes or kind not in ("weight", "bias"):
            return False
        if not self.reader.has(weight, "delta"):
            return False
        return self.reader.family.is_routed_linear(path, self.reader.shape(weight, "base"))

    def make_item(self, name: str) -> Item:
        """Return the item of a tensor. Placement and loader both decide by this."""
        shape, num_bytes = self.shape(name), self._stored_bytes(name)
        if not self.is_routed(name):
            stored = self._stored_dtype(name)
            dtype = self.dtype if stored.is_floating_point else stored
            return Item(name, "plain", (Field("value", dtype, shape),), num_bytes)
        count = len(self.reader.expert_names)
        fields = [Field("text", self.dtype, shape)]
        if len(shape) == 1:
            fields.append(Field("experts", self.dtype, (count, *shape)))
            return Item(name, "bias", tuple(fields), num_bytes)
        if self.policy == "resident":
            fields.append(Field("modalities", self.dtype, (count, *shape)))
        elif count > 1:
            fields.append(Field("delta", self.reader.dtype_of(name, "delta"), shape))
            fields.append(Field("masks", torch.uint8, (count, shape[0], -(-shape[1] // 8))))
        return Item(name, "matrix", tuple(fields), num_bytes)

    def make_expert_head(self) -> Item | None:
        """Return the head of an expert whose base has none because it is tied, if there is one."""
        head = self.reader.family.head
        if not self.expert or head in self.reader.llm_names():
            return None
        copied = self._copied_name(head)
        if copied is None:
            return None
        shape = self.reader.shape(copied, "carried", self.expert)
        num_bytes = self.reader.stored_bytes(copied, "carried", self.expert)
        return Item(head, "plain", (Field("value", self.dtype, shape),), num_bytes)

    def copied_digests(self, name: str) -> tuple[str, ...]:
        """Return the digests of the expert's copied tensor that replaces one of the model."""
        copied = self._copied_name(name)
        if copied is None or not self.expert:
            return ()
        return self.reader.digests(copied, "carried", self.expert)

    def read(self, item: Item) -> dict[str, torch.Tensor]:
        """Return the whole tensor of each field of an item.

        Raises:
            DamagedObject: the bytes do not match the digests in the manifest.
        """
        reader, name = self.reader, item.name
        if item.kind == "plain":
            return {"value": self._read_plain(name).to(item.fields[0].dtype)}
        if item.kind == "bias":
            experts = [
                rebuild_weight(reader, name, expert=expert, dtype=self.dtype)
                for expert in reader.expert_names
            ]
            text = text_weight(reader, name, dtype=self.dtype)
            return {"text": text, "experts": torch.stack(experts)}
        weights = read_routed_weights(reader, name, dtype=self.dtype, policy=self.policy)
        tensors = {
            "text": weights.text,
            "delta": weights.delta,
            "masks": weights.masks,
            "modalities": weights.modalities,
        }
        return {field: tensor for field, tensor in tensors.items() if tensor is not None}

    def _read_plain(self, name: str) -> torch.Tensor:
        if not self.expert:
            return text_weight(self.reader, name, dtype=self.dtype)
        if name == self.reader.family.head and not self.reader.has(name, "base"):
            copied = self._copied_name(name)
            if copied is not None:
                return self.reader.read(copied, "carried", self.expert)
        return rebuild_weight(self.reader, name, expert=self.expert, dtype=self.dtype)

    def _copied_name(self, name: str) -> str | None:
        """Return the name of the expert's copied tensor that replaces a language-model tensor."""
        if not self.expert:
            return None
        copied = self.reader.expert_name(name, expert=self.expert)
        return copied if self.reader.has(copied, "carried", self.expert) else None

    def _stored_dtype(self, name: str) -> torch.dtype:
        role: Literal["merged", "base"] = "merged" if self.reader.has(name, "merged") else "base"
        return self.reader.dtype_of(name, role)

    def _stored_bytes(self, name: str) -> int:
        reader = self.reader
        copied = self._copied_name(name)
        if copied is not None and self.expert:
            return reader.stored_bytes(copied, "carried", self.expert)
        if reader.has(name, "merged"):
            return reader.stored_bytes(name, "merged")
        total = reader.stored_bytes(name, "base") + reader.stored_bytes(name, "delta")
        for expert in [self.expert] if self.expert else reader.expert_names:
            total += reader.stored_bytes(name, "mask", expert)
        if self.expert:
            total += reader.stored_bytes(name, "extra_rows", self.expert)
        return total


def read_routed_weights(
    reader: BuildReader, name: str, *, dtype: torch.dtype, policy: Policy
) -> RoutedWeights:
    """Return the weights of the RoutedLinear of a matrix [rows, width], θ_text in `dtype`.

    Raises:
        DamagedObject: the bytes do not match the digests in the manifest.
    """
    rescalers = [reader.rescaler(expert) for expert in reader.expert_names]
    height, width = reader.shape(name, "base")
    if policy == "packed" and width % 8 == 0:
        weight = read_masked_weight(
            reader,
            reader.masked_pieces(name),
            dtype=dtype,
            factors=rescalers,
            keeps_delta=len(rescalers) > 1,
        )
        if weight is not None:
            factors, divisor = RoutedWeights.make_factors(rescalers)
            if weight.delta is None:  # θ_text of a single expert is its weight
                return RoutedWeights(weight.values, None, None, None, factors, divisor)
            # Rows end on whole bytes, so the stored words hold the rows from their first byte on.
            masks = weight.masks[:, : height * width // 8].view(-1, height, width // 8)
            return RoutedWeights(weight.values, weight.delta, masks, None, factors, divisor)
    base = reader.read(name, "base")
    packed = [
        pack_rows(reader.read_packed_mask(name, expert), base.shape)
        for expert in reader.expert_names
    ]
    return RoutedWeights.from_masks(
        base,
        reader.read(name, "delta"),
        torch.stack(packed),
        dtype=dtype,
        policy=policy,
        rescalers=rescalers,
    )
