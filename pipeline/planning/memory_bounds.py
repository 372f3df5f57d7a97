"""How much memory a task takes, stated before it runs: a bound that depends on blocks, not on the
size of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.writer import WRITER_BUFFER_BYTES, WRITER_CONCURRENCY
from mmerge.workers.checkpoints.lora_weights import TILE_ROWS
from mmerge.workers.checkpoints.sources import (
    BlockScaledSource,
    LowRankSource,
    total_prefetch_bytes,
)
from mmerge.workers.methods.interface import Granularity, Method, entries_at_once, num_columns
from mmerge.workers.reconstruction.bitmask import packed_bytes
from mmerge.workers.statistics.magnitude_histograms import scan_bytes
from mmerge.workers.task import TensorTask

WORKER_BYTES = 96 << 20
"""What a task needs beside its blocks: allocator, readers, small objects."""
WRITER_BYTES = WRITER_CONCURRENCY * WRITER_BUFFER_BYTES
COPY_PEAK_BYTES = WRITER_BYTES + WORKER_BYTES
"""Bound on the memory of a task that copies."""
MIN_BLOCK_ENTRIES = 1 << 16
PROCESS_BYTES = 512 << 20
"""What a process takes before it has a task: the interpreter, torch, compiled kernels."""


@dataclass(frozen=True)
class Working:
    """What decides the memory of a merge, beside the tensors."""

    method: Method
    block_entries: int
    keeps_non_finite: bool

    def streams(self, tensor: TensorTask) -> bool:
        """Return whether a tensor goes through a compiled path in all passes, whatever it must see
        at once.
        """
        if not self.method.compiled_pass:
            return False
        # A path may decline a tensor that holds NaN or Inf, and stages have none: the method's own
        # code then takes it, whole.
        has_stages = type(self.method).measure_block is not Method.measure_block
        return tensor.granularity != "tensor" or not (self.keeps_non_finite or has_stages)


def merge_peak_bytes(tensors: Sequence[TensorTask], working: Working) -> int:
    """Return a bound on the memory of a scan, measure or merge task in bytes."""
    num_experts = max(len(tensor.experts) for tensor in tensors)
    num_masks = num_experts if working.method.kind == "masks" else 0
    blocks = max(_block_bytes(tensor, num_experts, working) for tensor in tensors)
    masks = num_masks * max(packed_bytes(tensor.num_entries) for tensor in tensors)
    histograms = scan_bytes([tensor.num_entries for tensor in tensors], num_experts=num_experts)
    prefetch_bytes = max(total_prefetch_bytes((tensor.base, *tensor.experts)) for tensor in tensors)
    forming = max(_forming_bytes(tensor, working.block_entries) for tensor in tensors)
    return max(blocks + masks, histograms) + forming + prefetch_bytes + WRITER_BYTES + WORKER_BYTES


def _block_bytes(tensor: TensorTask, num_experts: int, working: Working) -> int:
    shape = tensor.base.spec.shape
    if working.streams(tensor):
        granularity: Granularity = "row" if tensor.granularity == "row" else "entry"
        entries = min(
            entries_at_once(shape, working.block_entries, granularity=granularity),
            tensor.num_entries,
        )
        widest = max(DTYPE_BYTES[source.spec.dtype] for source in (tensor.base, *tensor.experts))
        # Inputs as stored (float8 beside its float32), the merged block, and rows of float32 where
        # a method ranks rows.
        rows = num_columns(shape) * (num_experts + 7) * 4 if granularity == "row" else 0
        return entries * ((num_experts + 1) * max(widest, 5 if widest == 1 else 0) + 4) + rows
    entries = min(
        entries_at_once(shape, working.block_entries, granularity=tensor.granularity),
        tensor.num_entries,
    )
    # Each input as stored and widened (8 + 4 bytes at most), and what the method says that it works
    # with.
    method_bytes = working.method.working_bytes(entries, num_experts=num_experts, shape=shape)
    return entries * (num_experts + 1) * 12 + method_bytes


def _forming_bytes(tensor: TensorTask, block_entries: int) -> int:
    """Return what reading adapters takes beside the weights they make: their factors, and the
    buffers of one block.

    Per entry the base once more as read, copied and widened, and the product in tiles and as one;
    tiles reach over the block.
    """
    adapters = [source for source in tensor.experts if isinstance(source, LowRankSource)]
    sources = (tensor.base, *tensor.experts, *(adapter.base for adapter in adapters))
    scaled = [source for source in sources if isinstance(source, BlockScaledSource)]
    if not adapters and not scaled:
        return 0
    shape = tensor.base.spec.shape
    entries = min(
        entries_at_once(shape, block_entries, granularity=tensor.granularity), tensor.num_entries
    )
    forming = 0
    if adapters:
        forming += sum(adapter.factor_bytes for adapter in adapters)
        forming += 24 * entries + 16 * TILE_ROWS * shape[1]
    if scaled:
        forming += sum(source.scale_bytes for source in scaled)
        # Whole rows of scales, one per entry, reach over the block on either side.
        forming += 24 * entries + 16 * shape[-1]
    return forming


def process_bytes(peaks: Iterable[int]) -> int:
    """Return what a process takes with the largest of tasks that have these peaks."""
    return PROCESS_BYTES + max([*peaks, COPY_PEAK_BYTES])


def too_little_memory(needed: int, allowed: int) -> RecipeError:
    """Return the error of a limit that no block size keeps."""
    return RecipeError(
        f"--memory: the largest task needs {needed / 1e9:.2f} GB with its process,"
        f" {allowed / 1e9:.2f} GB are allowed. Allow more, take a smaller --block-entries if you"
        " gave one, or a method that needs no whole tensors"
    )
