"""Which device holds what of a composite, decided from the table of a build before a byte of a
tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Literal

import torch

from mmerge.manifests.errors import CheckpointError, PlacementError
from mmerge.manifests.format.manifest import read_file
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.composite.routed_linear import Policy, block_rows
from mmerge.workers.composite.tensor_parallel import Division
from mmerge.workers.composite.weight_items import Fetcher, Item, part_shape, share_out
from mmerge.workers.families.registry import is_before_layers
from mmerge.workers.modalities.processor_encoder import make_config
from mmerge.workers.reconstruction.build_reader import BuildReader

By = Literal["tensor", "layers"]
RESERVE_BYTES = 1_000_000_000
"""Of a GPU, for its driver's context, the allocator's gaps and the buffers of libraries."""
MAX_DEVICES = 64
"""So many devices are tried to say how many would do."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that one device holds."""

    weights: int = 0
    """Weights of text tokens, embedding, head and norms; in retention mode the expert's."""
    task_vector: int = 0
    masks: int = 0
    modalities: int = 0
    """Materialised weights of every modality (policy `resident`), and adapters."""
    encoders: int = 0
    kv_cache: int = 0
    workspace: int = 0
    """Activations of a prefill of the whole context, logits, and the block of weights that is being
    formed.
    """
    reserve: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def add(self, **more: int) -> DeviceMemory:
        """Return this with some bytes more."""
        return replace(
            self, **{name: getattr(self, name) + num_bytes for name, num_bytes in more.items()}
        )


@dataclass(frozen=True)
class Stage:
    """One device: which layers it holds (all of them, cut, in tensor parallelism), and how much of
    its memory that takes.
    """

    device: str
    capacity: int
    memory: DeviceMemory
    first_layer: int
    last_layer: int
    num_layers: int

    def holds(self, name: str) -> bool:
        """Return whether a language-model tensor belongs to this stage's layers; embeddings to the
        first, norm and head to the last.
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
        """Processes that it takes: one per device in tensor parallelism, one in all when layers are
        spread.
        """
        return len(self.stages) if self.by == "tensor" else 1

    @property
    def fits(self) -> bool:
        """Whether every device has the memory."""
        return all(stage.memory.total <= stage.capacity for stage in self.stages)


def parse_devices(text: str) -> list[int]:
    """Return the memory of each device in bytes from `4x80`, `80` or `2x80,1x40`, in GB (10⁹
    bytes). Raises PlacementError.
    """
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(?:(\d+)[x×])?(\d+(?:\.\d+)?)(?:GB)?", part, re.IGNORECASE)
        if not match or float(match[2]) <= 0 or not 0 < int(match[1] or 1) <= 1024:
            raise PlacementError(
                f"{text!r}: expected devices as COUNTxGB, such as 4x80 or 2x80,2x40"
            )
        found += [round(float(match[2]) * 1e9)] * int(match[1] or 1)
    return found


def plan_placement(
    uri: str,
    *,
    devices: Sequence[int],
    by: By | None = None,
    policy: Policy = "packed",
    expert: str | None = None,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    batch: int = 1,
    device_type: str = "cuda",
) -> Placement:
    """Return where each part of a composite goes. Reads the manifest and its table only.

    Args:
        uri: the composite.
        devices: memory of each, bytes.
        by: `tensor` cuts every matrix over all devices (equal ones, one process each); `layers`
            gives each device some layers, in one process. By tensor if the model can be cut so, if
            absent.
        policy: see `workers.routing.Policy`.
        expert: the one that is rebuilt alone (retention); all in expansion mode if None.
        dtype: of the loaded weights; the build's if absent.
        context: tokens per prompt and answer together; the model's longest, at most 4,096, if
            absent.
        batch: prompts at once.
        device_type: `cuda`, or `cpu` for tests; names the devices.

    Raises:
        PlacementError: it does not fit (the message has the numbers), or the model cannot be
            divided so.
    """
    planner = _Planner(BuildReader(uri), expert, dtype, policy, context, batch)
    placement = planner.plan(list(devices), by, device_type)
    if not placement.fits:
        raise PlacementError(planner.explain(placement, device_type))
    return placement


class _Planner:
    def __init__(
        self,
        reader: BuildReader,
        expert: str | None,
        dtype: torch.dtype | None,
        policy: Policy,
        context: int | None,
        batch: int,
    ) -> None:
        self.reader, self.expert, self.policy, self.batch = reader, expert, policy, batch
        self.dtype = dtype or reader.dtype
        self.config = _read_text_config(reader, expert)
        longest = int(getattr(self.config, "max_position_embeddings", None) or 4096)
        self.context = min(longest, 4096) if context is None else context
        if self.context > longest:
            raise PlacementError(
                f"a context of {self.context} tokens was asked for, the model takes {longest}. Give"
                " a shorter one"
            )
        self.num_layers = int(self.config.num_hidden_layers)
        fetcher = Fetcher(reader, expert=expert, dtype=self.dtype, policy=policy)
        self.family = reader.family
        self.items = [fetcher.make_item(name) for name in reader.llm_names()]
        self.embedding = next(item for item in self.items if self.family.is_embedding(item.name))
        self.is_tied = self.family.head not in reader.llm_names()

    def plan(self, devices: list[int], by: By | None, device_type: str) -> Placement:
        if by is None:
            by = "tensor" if len(set(devices)) == 1 and self._can_cut(len(devices)) else "layers"
        stages = (
            self._by_tensor(devices, device_type)
            if by == "tensor"
            else self._by_layers(devices, device_type)
        )
        return Placement(by, self.policy, self.context, self.batch, tuple(stages))

    def _can_cut(self, num_ranks: int) -> bool:
        try:
            division = Division.of(self.config, family=self.family, num_ranks=num_ranks)
            for item in self.items:
                division.part_of(item.name, item.fields[0].shape, rank=0)
        except PlacementError:
            return False
        return True

    # By tensor.

    def _by_tensor(self, devices: list[int], device_type: str) -> list[Stage]:
        if len(set(devices)) > 1:
            raise PlacementError(
                "by tensor every device gets the same: give devices of one size, or place by layers"
            )
        division = Division.of(self.config, family=self.family, num_ranks=len(devices))
        encoders = self._encoders(len(devices))
        stages = []
        for rank, capacity in enumerate(devices):
            memory = DeviceMemory(encoders=encoders[rank], reserve=_reserve(device_type))
            for item in self.items:
                memory = self._add_item(memory, item, division, rank)
            memory = memory.add(
                kv_cache=self._kv_cache(self.num_layers, division),
                workspace=self._workspace(len(devices)),
            )
            stages.append(
                Stage(
                    _name(device_type, rank),
                    capacity,
                    memory,
                    0,
                    self.num_layers - 1,
                    self.num_layers,
                )
            )
        return stages

    def _add_item(
        self, memory: DeviceMemory, item: Item, division: Division, rank: int
    ) -> DeviceMemory:
        part = division.part_of(item.name, item.fields[0].shape, rank=rank)
        for field in item.fields:
            shape = part_shape(field, part, is_vector=len(item.fields[0].shape) == 1)
            kind = {
                "delta": "task_vector",
                "masks": "masks",
                "modalities": "modalities",
                "experts": "modalities",
            }.get(field.name, "weights")
            memory = memory.add(**{kind: prod(shape) * field.dtype.itemsize})
        return memory.add(modalities=self._adapters(item.name) // division.num_ranks)

    # By layers.

    def _by_layers(self, devices: list[int], device_type: str) -> list[Stage]:
        if len(devices) > self.num_layers:
            raise PlacementError(
                f"{len(devices)} devices for {self.num_layers} layers: give at most one device per"
                " layer"
            )
        if len(devices) > 1:
            for item in self.items:  # an unknown family refuses here, and names the tensor
                self.family.rule_of(item.name, item.fields[0].shape)
        whole = Division.of(self.config, family=self.family, num_ranks=1)
        layers = [DeviceMemory(kv_cache=self._kv_cache(1, whole)) for _ in range(self.num_layers)]
        front, back = DeviceMemory(encoders=sum(self._encoders(1))), DeviceMemory()
        for item in self.items:
            layer = layer_of(item.name)
            if layer is not None:
                layers[layer] = self._add_item(layers[layer], item, whole, 0)
            elif self.family.is_embedding(item.name):
                front = self._add_item(front, item, whole, 0)
                if self.is_tied and len(devices) > 1:
                    back = self._add_item(back, item, whole, 0)
            else:
                back = self._add_item(back, item, whole, 0)
        bounds = _cut_layers(
            layers, front, back, devices, fixed=self._workspace(1) + _reserve(device_type)
        )
        stages = []
        for index, (first, stop) in enumerate(bounds):
            memory = DeviceMemory(workspace=self._workspace(1), reserve=_reserve(device_type))
            for each in [
                *layers[first:stop],
                *([front] if index == 0 else []),
                *([back] if index == len(devices) - 1 else []),
            ]:
                memory = memory.add(
                    **{field.name: getattr(each, field.name) for field in fields(each)}
                )
            stages.append(
                Stage(
                    _name(device_type, index),
                    devices[index],
                    memory,
                    first,
                    stop - 1,
                    self.num_layers,
                )
            )
        return stages

    # What is not in the language model's tensors.

    def _adapters(self, name: str) -> int:
        if self.reader.manifest.kind != "adapters":
            return 0
        path, found = name.removesuffix(".weight"), 0
        for expert in [self.expert] if self.expert else self.reader.expert_names:
            record = self.reader.manifest.to_expert(expert).adapters
            for adapter in (record.modality_adapter, record.default_adapter) if record else ():
                for factor in "AB":
                    key = f"{path}.lora_{factor}.{adapter}.weight"
                    if self.reader.has(key, "adapter", expert):
                        found += (
                            prod(self.reader.shape(key, "adapter", expert)) * self.dtype.itemsize
                        )
        return found

    def _encoders(self, num_ranks: int) -> list[int]:
        """Return the bytes of encoders per rank, as the loader shares them out; each holds its
        expert's embedding.
        """
        names = [self.expert] if self.expert else self.reader.expert_names
        stored = [
            sum(
                self.reader.stored_bytes(key, "carried", name)
                for key in self.reader.names("carried", name)
            )
            for name in names
        ]
        embedding = self.embedding.fields[0]
        held = [0] * num_ranks
        for name, num_bytes, rank in zip(
            names, stored, share_out(stored, num_ranks=num_ranks), strict=True
        ):
            if num_bytes:
                extra = self.reader.stored_bytes(self.embedding.name, "extra_rows", name)
                held[rank] += num_bytes + prod(embedding.shape) * embedding.dtype.itemsize + extra
        return held

    def _kv_cache(self, num_layers: int, division: Division) -> int:
        per_token = (
            2 * num_layers * division.kv_heads_per_rank * division.head_dim * self.dtype.itemsize
        )
        return per_token * self.context * self.batch

    def _workspace(self, num_ranks: int) -> int:
        config, size = self.config, self.dtype.itemsize
        heads = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        width = getattr(config, "intermediate_size", None) or max(
            max(item.fields[0].shape) for item in self.items if layer_of(item.name) is not None
        )
        per_token = (6 * config.hidden_size + (3 * width + 4 * heads) // num_ranks) * size
        logits = self.batch * self.embedding.fields[0].shape[0] * 8
        # The reference forms a block in float32: θ_text, τ⋆, the mask's share and their sum.
        shapes = [item.fields[0].shape for item in self.items if item.kind == "matrix"]
        largest = max((block_rows(rows, width) * width for rows, width in shapes), default=0)
        forming = largest * (size + 4 * 4)
        return int(per_token * self.context * self.batch + logits + forming)

    def explain(self, placement: Placement, device_type: str) -> str:
        """Return why a placement does not fit, with the numbers, and what would."""
        lines = [
            f"{self.reader.uri}: does not fit ({placement.context:,} tokens, {placement.batch} at"
            f" once, policy {placement.policy!r}):"
        ]
        for stage in placement.stages:
            parts = ", ".join(
                f"{field.name.replace('_', ' ')} {_to_gb(getattr(stage.memory, field.name))}"
                for field in fields(stage.memory)
                if getattr(stage.memory, field.name)
            )
            verdict = "fits" if stage.memory.total <= stage.capacity else "does not fit"
            lines.append(
                f"  {stage.device}: {_to_gb(stage.memory.total)} GB of {_to_gb(stage.capacity)} GB,"
                f" {verdict} ({parts})"
            )
        return "\n".join([*lines, self._advise(placement, device_type)])

    def _advise(self, placement: Placement, device_type: str) -> str:
        size = max(stage.capacity for stage in placement.stages)
        for count in range(len(placement.stages) + 1, MAX_DEVICES + 1):
            ways: tuple[By, ...] = ("tensor", "layers")
            for by in ways:
                try:
                    tried = self.plan([size] * count, by, device_type)
                except PlacementError:
                    continue
                if tried.fits:
                    return (
                        f"{count} devices of {size / 1e9:g} GB would do, by {by}; or give a shorter"
                        " --context or a smaller --batch"
                    )
        return (
            f"Even {MAX_DEVICES} devices of {size / 1e9:g} GB are too few: give a shorter"
            " --context, a smaller --batch, or larger devices"
        )


def _cut_layers(
    layers: Sequence[DeviceMemory],
    front: DeviceMemory,
    back: DeviceMemory,
    devices: Sequence[int],
    *,
    fixed: int,
) -> list[tuple[int, int]]:
    """Return the layers (first, stop) of each device so that the fullest is as empty as it can be;
    each gets one at least.
    """

    def fill(share: float) -> list[tuple[int, int]] | None:
        bounds, start = [], 0
        for index, capacity in enumerate(devices):
            left, stop = capacity * share - fixed - (front.total if index == 0 else 0), start
            left -= back.total if index == len(devices) - 1 else 0
            most = len(layers) - (len(devices) - 1 - index)
            while stop < most and (stop == start or layers[stop].total <= left):
                left -= layers[stop].total
                stop += 1
            bounds.append((start, stop))
            start = stop
        # The last device gets what is left: that must fit too, or the share was too small.
        return bounds if start == len(layers) else None

    devices = [
        max(capacity, 1) for capacity in devices
    ]  # of a device without memory every share is nothing
    low, high = 0.0, 1.0
    while fill(high) is None:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) else (middle, high)
    found = fill(high)
    assert found is not None
    return found


def _read_text_config(reader: BuildReader, expert: str | None) -> Any:
    record = reader.manifest.to_expert(expert) if expert else reader.manifest.base
    owner = f"expert {expert!r}" if expert else "base"
    files = {
        file.name: read_file(reader.store, file)
        for file in record.files
        if file.name == "config.json"
    }
    if not files:
        raise CheckpointError(f"{owner}: the build has no config.json of it")
    return make_config(files, owner=owner).get_text_config()


def _to_gb(num_bytes: int) -> str:
    """Return bytes in GB, with so many digits that what does not fit is seen not to, on small
    devices too.
    """
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 10e9 else f"{num_bytes / 1e9:.4f}"


def _reserve(device_type: str) -> int:
    return RESERVE_BYTES if device_type == "cuda" else 0


def _name(device_type: str, index: int) -> str:
    return f"{device_type}:{index}" if device_type == "cuda" else device_type
