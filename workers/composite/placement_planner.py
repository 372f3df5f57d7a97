"""Plan a placement from the table of a build, before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch

from mmerge.manifests.errors import CheckpointError, PlacementError
from mmerge.manifests.format.manifest import read_file
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.composite.decoder.text_config import to_language_config
from mmerge.workers.composite.placement import By, DeviceMemory, Placement, Stage
from mmerge.workers.composite.routed_linear import Policy, block_rows
from mmerge.workers.composite.shard_exchange import assign_ranks, part_shape
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.composite.weight_items import Item, ItemReader
from mmerge.workers.modalities.expert_model import make_config
from mmerge.workers.reconstruction.language_reader import LanguageReader

RESERVE_BYTES = 1_000_000_000
"""Reserve of a GPU, see `DeviceMemory.reserve`."""
MAX_DEVICES = 64
"""The most devices that are tried for the advice of how many would do."""


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
    """Return which device holds which part of a composite.

    Args:
        uri: the composite; only its manifest and table are read.
        devices: memory of each, bytes.
        by: `tensor` divides every matrix over equal devices, one process each; `layers` gives each
            device some layers, in one process. If absent by tensor where the model allows it.
        policy: see `routed_linear.Policy`.
        expert: the expert that is rebuilt alone (retention); all in expansion mode if None.
        dtype: of the loaded weights; the build's if absent.
        context: tokens per prompt and answer together; the model's longest, at most 4,096, if
            absent.
        batch: prompts at once.
        device_type: `cuda`, or `cpu` for tests; names the devices.

    Raises:
        PlacementError: it does not fit (the message has the numbers), or the model cannot be
            divided so.
    """
    planner = _Planner(
        LanguageReader(uri), expert=expert, dtype=dtype, policy=policy, context=context, batch=batch
    )
    placement = planner.plan(devices, by=by, device_type=device_type)
    if not placement.fits:
        raise PlacementError(planner.explain(placement, device_type))
    return placement


class _Planner:
    def __init__(
        self,
        reader: LanguageReader,
        *,
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
        item_reader = ItemReader(reader, expert=expert, dtype=self.dtype, policy=policy)
        self.family = reader.family
        self.items = [item_reader.make_item(name) for name in reader.llm_names()]
        self.embedding = next(item for item in self.items if self.family.is_embedding(item.name))
        self.is_tied = self.family.head not in reader.llm_names()

    def plan(self, devices: Sequence[int], *, by: By | None, device_type: str) -> Placement:
        """Return a placement, whether it fits or not."""
        if by is None:
            by = "tensor" if len(set(devices)) == 1 and self._can_divide(len(devices)) else "layers"
        if by == "tensor":
            stages = self._by_tensor(devices, device_type)
        else:
            stages = self._by_layers(devices, device_type)
        return Placement(by, self.policy, self.context, self.batch, tuple(stages))

    def _can_divide(self, num_ranks: int) -> bool:
        try:
            plan = self._make_plan(num_ranks)
            for item in self.items:
                plan.part_of(item.name, item.fields[0].shape, rank=0)
        except PlacementError:
            return False
        return True

    def _make_plan(self, num_ranks: int) -> TensorParallelPlan:
        return TensorParallelPlan.from_config(self.config, family=self.family, num_ranks=num_ranks)

    # By tensor.

    def _by_tensor(self, devices: Sequence[int], device_type: str) -> list[Stage]:
        if len(set(devices)) > 1:
            raise PlacementError(
                "by tensor every device gets the same: give devices of one size, or place by layers"
            )
        plan = self._make_plan(len(devices))
        encoders = self._encoder_bytes(len(devices))
        stages = []
        for rank, capacity in enumerate(devices):
            memory = DeviceMemory(
                encoders=encoders[rank],
                kv_cache=self._kv_cache_bytes(self.num_layers, plan),
                workspace=self._workspace_bytes(len(devices)),
                reserve=_reserve(device_type),
            )
            for item in self.items:
                memory = memory.plus(self._item_memory(item, plan, rank))
            device = _device_name(device_type, rank)
            last_layer = self.num_layers - 1
            stages.append(Stage(device, capacity, memory, 0, last_layer, self.num_layers))
        return stages

    def _item_memory(self, item: Item, plan: TensorParallelPlan, rank: int) -> DeviceMemory:
        """Return the memory of one rank's part of an item, and of its Linear's adapters."""
        part = plan.part_of(item.name, item.fields[0].shape, rank=rank)
        is_vector = len(item.fields[0].shape) == 1
        num_bytes = dict.fromkeys(("weights", "task_vector", "masks", "modalities"), 0)
        kinds = {
            "delta": "task_vector",
            "masks": "masks",
            "modalities": "modalities",
            "experts": "modalities",
        }
        for field in item.fields:
            shape = part_shape(field, part, is_vector=is_vector)
            num_bytes[kinds.get(field.name, "weights")] += prod(shape) * field.dtype.itemsize
        num_bytes["modalities"] += self._adapter_bytes(item.name) // plan.num_ranks
        return DeviceMemory(**num_bytes)

    # By layers.

    def _by_layers(self, devices: Sequence[int], device_type: str) -> list[Stage]:
        if len(devices) > self.num_layers:
            raise PlacementError(
                f"{len(devices)} devices for {self.num_layers} layers: give at most one device per"
                " layer"
            )
        if len(devices) > 1:
            for item in self.items:  # an unknown family refuses here, and names the tensor
                self.family.rule_of(item.name, item.fields[0].shape)
        groups = self._layer_memories(is_spread=len(devices) > 1)
        fixed = DeviceMemory(workspace=self._workspace_bytes(1), reserve=_reserve(device_type))
        bounds = _cut_layers(groups, devices, fixed=fixed.total)
        stages = []
        for index, (first, stop) in enumerate(bounds):
            memory = fixed
            if index == 0:
                memory = memory.plus(groups.front)
            if index == len(devices) - 1:
                memory = memory.plus(groups.back)
            for layer in groups.layers[first:stop]:
                memory = memory.plus(layer)
            device = _device_name(device_type, index)
            stages.append(Stage(device, devices[index], memory, first, stop - 1, self.num_layers))
        return stages

    def _layer_memories(self, *, is_spread: bool) -> _LayerMemories:
        """Return the memory of each layer, and of what must be on the first and the last device."""
        whole = self._make_plan(1)
        layers = [
            DeviceMemory(kv_cache=self._kv_cache_bytes(1, whole)) for _ in range(self.num_layers)
        ]
        front = DeviceMemory(encoders=sum(self._encoder_bytes(1)))
        back = DeviceMemory()
        for item in self.items:
            memory = self._item_memory(item, whole, 0)
            layer = layer_of(item.name)
            if layer is not None:
                layers[layer] = layers[layer].plus(memory)
            elif self.family.is_embedding(item.name):
                front = front.plus(memory)
                if self.is_tied and is_spread:  # tied weights have a copy on the last device
                    back = back.plus(memory)
            else:
                back = back.plus(memory)
        return _LayerMemories(layers, front, back)

    # Memory outside of the language model's tensors.

    def _adapter_bytes(self, name: str) -> int:
        if self.reader.manifest.kind != "adapters":
            return 0
        path, total = name.removesuffix(".weight"), 0
        for expert in [self.expert] if self.expert else self.reader.expert_names:
            record = self.reader.manifest.to_expert(expert).adapters
            for adapter in (record.modality_adapter, record.default_adapter) if record else ():
                for factor in "AB":
                    key = f"{path}.lora_{factor}.{adapter}.weight"
                    if self.reader.has(key, "adapter", expert):
                        shape = self.reader.shape(key, "adapter", expert)
                        total += prod(shape) * self.dtype.itemsize
        return total

    def _encoder_bytes(self, num_ranks: int) -> list[int]:
        """Return the bytes of encoders per rank, assigned as the loader does.

        Each encoder has a copy of its expert's embedding.
        """
        reader = self.reader
        names = [self.expert] if self.expert else reader.expert_names
        stored = [reader.encoder_bytes(name) for name in names]
        embedding = self.embedding.fields[0]
        totals = [0] * num_ranks
        ranks = assign_ranks(stored, num_ranks=num_ranks)
        for name, num_bytes, rank in zip(names, stored, ranks, strict=True):
            if num_bytes:
                extra = reader.stored_bytes(self.embedding.name, "extra_rows", name)
                totals[rank] += num_bytes + prod(embedding.shape) * embedding.dtype.itemsize + extra
        return totals

    def _kv_cache_bytes(self, num_layers: int, plan: TensorParallelPlan) -> int:
        per_token = 2 * num_layers * plan.kv_heads_per_rank * plan.head_dim * self.dtype.itemsize
        return per_token * self.context * self.batch

    def _workspace_bytes(self, num_ranks: int) -> int:
        config, size = self.config, self.dtype.itemsize
        head_dim = getattr(config, "head_dim", None)
        heads = config.num_attention_heads * (
            head_dim or config.hidden_size // config.num_attention_heads
        )
        width = getattr(config, "intermediate_size", None) or max(
            max(item.fields[0].shape) for item in self.items if layer_of(item.name) is not None
        )
        divided = (3 * width + 4 * heads) // num_ranks
        per_token = (6 * config.hidden_size + divided) * size
        logits = self.batch * self.embedding.fields[0].shape[0] * 8
        # The torch reference computes a block in float32: θ_text, τ⋆, the weighted masks, the sum.
        shapes = [item.fields[0].shape for item in self.items if item.kind == "matrix"]
        largest = max((block_rows(rows, width) * width for rows, width in shapes), default=0)
        block = largest * (size + 4 * 4)
        return int(per_token * self.context * self.batch + logits + block)

    def explain(self, placement: Placement, device_type: str) -> str:
        """Return why a placement does not fit, with the numbers, and what would fit."""
        lines = [
            f"{self.reader.uri}: does not fit ({placement.context:,} tokens, {placement.batch} at"
            f" once, policy {placement.policy!r}):"
        ]
        for stage in placement.stages:
            parts = [
                f"{field.name.replace('_', ' ')} {_to_gb(getattr(stage.memory, field.name))}"
                for field in fields(stage.memory)
                if getattr(stage.memory, field.name)
            ]
            verdict = "fits" if stage.memory.total <= stage.capacity else "does not fit"
            lines.append(
                f"  {stage.device}: {_to_gb(stage.memory.total)} GB of {_to_gb(stage.capacity)} GB,"
                f" {verdict} ({', '.join(parts)})"
            )
        return "\n".join([*lines, self._advise(placement, device_type)])

    def _advise(self, placement: Placement, device_type: str) -> str:
        """Return how many devices would do, or that none would."""
        size = max(stage.capacity for stage in placement.stages)
        strategies: tuple[By, ...] = ("tensor", "layers")
        for count in range(len(placement.stages) + 1, MAX_DEVICES + 1):
            for by in strategies:
                try:
                    candidate = self.plan([size] * count, by=by, device_type=device_type)
                except PlacementError:
                    continue
                if candidate.fits:
                    return (
                        f"{count} devices of {size / 1e9:g} GB would do, by {by}; or give a shorter"
                        " --context or a smaller --batch"
                    )
        return (
            f"Even {MAX_DEVICES} devices of {size / 1e9:g} GB are too few: give a shorter"
            " --context, a smaller --batch, or larger devices"
        )


@dataclass(frozen=True)
class _LayerMemories:
    """Memory of a model placed by layers."""

    layers: list[DeviceMemory]
    front: DeviceMemory
    """On the first device: embedding and encoders."""
    back: DeviceMemory
    """On the last device: norm and head."""


def _cut_layers(
    groups: _LayerMemories, devices: Sequence[int], *, fixed: int
) -> list[tuple[int, int]]:
    """Return the layers (first, stop) of each device, at least one.

    The fullest device, relative to its memory, is as empty as possible: a bisection over the share
    of each device that is filled. `fixed` bytes are used on every device.
    """
    capacities = [max(capacity, 1) for capacity in devices]  # any share of 0 bytes is 0
    low, high = 0.0, 1.0
    while _fill_devices(groups, capacities, share=high, fixed=fixed) is None:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _fill_devices(groups, capacities, share=middle, fixed=fixed):
            high = middle
        else:
            low = middle
    bounds = _fill_devices(groups, capacities, share=high, fixed=fixed)
    assert bounds is not None
    return bounds


def _fill_devices(
    groups: _LayerMemories, capacities: Sequence[int], *, share: float, fixed: int
) -> list[tuple[int, int]] | None:
    """Return the layers of each device if no more than `share` of it is filled, None if too few."""
    num_layers, bounds, start = len(groups.layers), [], 0
    for index, capacity in enumerate(capacities):
        free = capacity * share - fixed
        free -= groups.front.total if index == 0 else 0
        free -= groups.back.total if index == len(capacities) - 1 else 0
        max_stop = num_layers - (len(capacities) - 1 - index)
        stop = start
        while stop < max_stop and (stop == start or groups.layers[stop].total <= free):
            free -= groups.layers[stop].total
            stop += 1
        bounds.append((start, stop))
        start = stop
    return bounds if start == num_layers else None


def _read_text_config(reader: LanguageReader, expert: str | None) -> Any:
    record = reader.manifest.to_expert(expert) if expert else reader.manifest.base
    owner = f"expert {expert!r}" if expert else "base"
    entry = next((file for file in record.files if file.name == "config.json"), None)
    if entry is None:
        raise CheckpointError(f"{owner}: the build has no config.json of it")
    files = {entry.name: read_file(reader.store, entry)}
    return to_language_config(make_config(files, owner=owner)).get_text_config()


def _to_gb(num_bytes: int) -> str:
    """Return bytes in GB; with four decimals below 10, so that small excesses are visible."""
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 10e9 else f"{num_bytes / 1e9:.4f}"


def _reserve(device_type: str) -> int:
    return RESERVE_BYTES if device_type == "cuda" else 0


def _device_name(device_type: str, index: int) -> str:
    return f"{device_type}:{index}" if device_type == "cuda" else device_type
