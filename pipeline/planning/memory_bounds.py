"""Memory bounds of tasks, stated before they run; they depend on blocks, not on tensor sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.object_header import packed_bytes
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.writer import WRITER_BUFFER_BYTES, WRITER_CONCURRENCY
from mmerge.workers.checkpoints.lora_weights import TILE_ROWS
from mmerge.workers.checkpoints.sources import (
    FormedSource,
    TensorSource,
    total_prefetch_bytes,
)
from mmerge.workers.methods.interface import (
    MAX_COMPILED_EXPERTS,
    Granularity,
    Method,
    entries_at_once,
    num_columns,
)
from mmerge.workers.statistics.magnitude_histograms import scan_bytes
from mmerge.workers.task import TensorTask

WORKER_BYTES = 96 << 20
"""Memory of a task apart from its blocks: allocator, readers, small objects."""
WRITER_BYTES = WRITER_CONCURRENCY * WRITER_BUFFER_BYTES
COPY_PEAK_BYTES = WRITER_BYTES + WORKER_BYTES
"""Memory bound of a copy task of stored tensors."""
COPY_ENTRIES = 1 << 20
"""Most entries that a copy task forms at once."""
MIN_BLOCK_ENTRIES = 1 << 16
MAX_HELD_BYTES = 512 << 20
"""Limit for the object of a shard that is scanned and merged in one pass: it is held in memory."""
PROCESS_BYTES = 512 << 20
"""Memory of a process without a task: interpreter, torch, compiled kernels."""


@dataclass(frozen=True)
class MergeMemory:
    """What the memory of a merge depends on, apart from the tensors."""

    method: Method
    block_entries: int
    keeps_non_finite: bool
    has_stages: bool
    """Whether the method measures the inputs in stages before it merges."""

    def streams(self, tensor: TensorTask) -> bool:
        """Return whether every pass over a tensor goes through compiled code, block by block.

        Compiled code streams a tensor even if the method's torch definition must see it whole.
        """
        if not self.method.compiled_pass or len(tensor.experts) > MAX_COMPILED_EXPERTS:
            return False
        # Compiled code declines a tensor with NaN or Inf, and stages have none: the torch
        # definition then takes the whole tensor.
        return tensor.granularity != "tensor" or not (self.keeps_non_finite or self.has_stages)


def merge_peak_bytes(tensors: Sequence[TensorTask], memory: MergeMemory) -> int:
    """Return a bound on the memory of a scan, measure or merge task in bytes."""
    num_experts = max(len(tensor.experts) for tensor in tensors)
    num_masks = num_experts if memory.method.kind == "masks" else 0
    blocks = max(_block_bytes(tensor, num_experts, memory) for tensor in tensors)
    masks = num_masks * max(packed_bytes(tensor.num_entries) for tensor in tensors)
    histograms = scan_bytes([tensor.num_entries for tensor in tensors], num_experts=num_experts)
    prefetch_bytes = max(total_prefetch_bytes((tensor.base, *tensor.experts)) for tensor in tensors)
    forming = max(_forming_bytes(tensor, memory.block_entries) for tensor in tensors)
    return max(blocks + masks, histograms) + forming + prefetch_bytes + WRITER_BYTES + WORKER_BYTES


def _block_bytes(tensor: TensorTask, num_experts: int, memory: MergeMemory) -> int:
    shape = tensor.base.spec.shape
    if memory.streams(tensor):
        granularity: Granularity = "row" if tensor.granularity == "row" else "entry"
        entries = min(
            entries_at_once(shape, memory.block_entries, granularity=granularity),
            tensor.num_entries,
        )
        widest = max(DTYPE_BYTES[source.spec.dtype] for source in (tensor.base, *tensor.experts))
        # Inputs as stored (float8 and its float32 copy), the merged block, and float32 rows where
        # a method ranks rows.
        rows = num_columns(shape) * (num_experts + 7) * 4 if granularity == "row" else 0
        return entries * ((num_experts + 1) * max(widest, 5 if widest == 1 else 0) + 4) + rows
    entries = min(
        entries_at_once(shape, memory.block_entries, granularity=tensor.granularity),
        tensor.num_entries,
    )
    # Each input as stored and as float32 (8 + 4 bytes at most), and the method's own buffers.
    method_bytes = memory.method.working_bytes(entries, num_experts=num_experts, shape=shape)
    return entries * (num_experts + 1) * 12 + method_bytes


def _forming_bytes(tensor: TensorTask, block_entries: int) -> int:
    """Return the memory for forming weights: adapted, dequantised or of another layout."""
    entries = min(
        entries_at_once(tensor.base.spec.shape, block_entries, granularity=tensor.granularity),
        tensor.num_entries,
    )
    return forming_bytes((tensor.base, *tensor.experts), entries=entries)


def forming_bytes(sources: Iterable[TensorSource], *, entries: int) -> int:
    """Return the memory for forming a block of several tensors, one after the other.

    What a task keeps of each (factors, scales), and the buffers of one block per level: a tensor
    may be formed of tensors that are formed. Per entry: the input as read, copied and widened, and
    the product, in tiles and whole. Tiles and rows extend beyond both ends of the block.
    """
    kept = 0
    buffers: list[int] = []
    level = [source for source in sources if isinstance(source, FormedSource)]
    while level:
        kept += sum(source.kept_bytes for source in level)
        buffers.append(24 * entries + 16 * TILE_ROWS * max(item.row_entries for item in level))
        parts = [part for source in level for part in source.inputs]
        level = [part for part in parts if isinstance(part, FormedSource)]
    return kept + sum(buffers)


def process_bytes(peaks: Iterable[int]) -> int:
    """Return the memory of a process that runs the largest of tasks with these bounds."""
    return PROCESS_BYTES + max([*peaks, COPY_PEAK_BYTES])


def too_little_memory(needed: int, allowed: int) -> RecipeError:
    """Return the error for a memory limit that no block size satisfies."""
    return RecipeError(
        f"--memory: the largest task needs {needed / 1e9:.2f} GB with its process,"
        f" {allowed / 1e9:.2f} GB are allowed. Raise the limit, lower --block-entries if it is"
        " set, or use a method that needs no whole tensors"
    )
