"""The last task of each shard; its digest names all that the object depends on."""

from __future__ import annotations

from collections.abc import Sequence

from mmerge.manifests.digest import digest_json
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.build.method_stages import to_hex
from mmerge.pipeline.build.threshold_search import Thresholds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Measured, identify_parameters
from mmerge.workers.task import CopyTask, MergeTask

ARITHMETIC_VERSION = 2
"""Raised when a method or an object's layout changes its bytes: no older object is then reused."""


def make_merge_task(
    plan: MergePlan,
    shard: MergeShard,
    digests: InputDigests,
    *,
    thresholds: Thresholds,
    earlier_results: Sequence[Measured],
    fresh: bool,
) -> MergeTask:
    """Return the task that merges a shard.

    Args:
        plan: the plan that the shard belongs to.
        shard: its inputs have been scanned.
        digests: of the inputs.
        thresholds: per tensor and expert; empty per tensor for methods that do not trim.
        earlier_results: per tensor, the results of the method's stages.
        fresh: merge it again, whatever is in the store.
    """
    names = tuple(expert.name for expert in plan.recipe.experts)
    method_parameters = tuple(plan.method_parameters[tensor.name] for tensor in shard.tensors)
    method = find_method(plan.recipe.method)
    tensors = []
    for index, tensor in enumerate(shard.tensors):
        tensors.append(
            {
                "name": tensor.name,
                "row_start": tensor.row_start,
                "shape": list(tensor.base.spec.shape),
                "inputs": digests.describe(tensor),
                "parameters": identify_parameters(method, method_parameters[index]),
                "thresholds": [value.hex() for value in thresholds[index]],
                "known": to_hex(earlier_results[index]),
            }
        )
    identity = {
        "arithmetic": ARITHMETIC_VERSION,
        "method": plan.recipe.method,
        "experts": list(names),
        "dtype": plan.dtype,
        "tensors": tensors,
    }
    return MergeTask(
        digest=digest_json(identity),
        shard=shard.name,
        expert_names=names,
        tensors=shard.tensors,
        thresholds=thresholds,
        method=plan.recipe.method,
        method_parameters=method_parameters,
        earlier_results=tuple(earlier_results),
        dtype=plan.dtype,
        block_entries=plan.block_entries,
        num_bytes=shard.bytes_in,
        peak_bytes=shard.peak_bytes,
        fresh=fresh,
    )


def make_copy_task(
    plan: MergePlan, shard: CopyShard, digests: InputDigests, *, fresh: bool
) -> CopyTask:
    """Return the task that copies a shard; all of its inputs have been scanned.

    The expert's name is no part of the digest: builds and experts share equal tensors.
    """
    tensors = []
    for tensor in shard.tensors:
        spec = tensor.source.spec
        contents = digests.identify(shard, tensor)
        tensors.append(
            [tensor.name, tensor.role, tensor.row_start, spec.dtype, list(spec.shape), contents]
        )
    identity = {"arithmetic": ARITHMETIC_VERSION, "role": shard.role, "tensors": tensors}
    return CopyTask(
        digest=digest_json(identity),
        shard=shard.name,
        role=shard.role,
        expert="",
        tensors=shard.tensors,
        block_entries=plan.block_entries,
        num_bytes=shard.num_bytes,
        peak_bytes=shard.peak_bytes,
        fresh=fresh,
    )
