"""The last task of each shard; its digest names all that the object depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.build.method_stages import to_hex
from mmerge.pipeline.build.shard_builds import BuildTask
from mmerge.pipeline.build.threshold_search import Thresholds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import (
    Measured,
    Method,
    MethodParameters,
    identify_parameters,
    parse_parameters,
)
from mmerge.workers.runtime.math_library import describe_math_library
from mmerge.workers.runtime.method_source import digest_source
from mmerge.workers.task import CopyTask, MergeDraft, MergeTask, OnePassTask, ScanTask, TensorTask

ARITHMETIC_VERSION = 2
"""Raised when a method or an object's layout changes its bytes: no older object is then reused."""


UNNAMED = "0" * 64
"""In place of the digest of a task whose inputs have not been scanned."""


def draft_merge_task(
    plan: MergePlan,
    shard: MergeShard,
    *,
    thresholds: Thresholds,
    earlier_results: Sequence[Measured],
    fresh: bool,
) -> MergeDraft:
    """Return the task that merges a shard, but for the digests of its inputs.

    Args:
        plan: the plan that the shard belongs to.
        shard: the shard.
        thresholds: per tensor and expert; empty per tensor for methods that do not trim.
        earlier_results: per tensor, the results of the method's stages.
        fresh: merge it again, whatever is in the store.
    """
    names = tuple(expert.name for expert in plan.recipe.experts)
    method_parameters = tuple(plan.method_parameters[tensor.name] for tensor in shard.tensors)
    method = find_method(plan.recipe.method)
    tensors: list[dict[str, Any]] = []
    math_libraries = []
    for index, tensor in enumerate(shard.tensors):
        tensors.append(
            {
                "name": tensor.name,
                "row_start": tensor.row_start,
                "shape": list(tensor.base.spec.shape),
                "parameters": identify_parameters(
                    method, method_parameters[index], dtype=plan.dtype
                ),
                "thresholds": [value.hex() for value in thresholds[index]],
                "known": to_hex(earlier_results[index]),
            }
        )
        math_libraries.append(_find_math_library(method, tensor, method_parameters[index]))
        if math_libraries[-1]:
            tensors[-1]["math_library"] = math_libraries[-1]
    identity = {
        "arithmetic": ARITHMETIC_VERSION,
        "method": plan.recipe.method,
        "experts": list(names),
        "dtype": plan.dtype,
        "tensors": tensors,
    }
    task = MergeTask(
        digest=UNNAMED,
        shard=shard.name,
        expert_names=names,
        tensors=shard.tensors,
        input_digests=(),
        thresholds=thresholds,
        method=plan.recipe.method,
        method_parameters=method_parameters,
        earlier_results=tuple(earlier_results),
        method_source=digest_source(type(method)),
        math_libraries=tuple(math_libraries),
        dtype=plan.dtype,
        block_entries=plan.block_entries,
        num_bytes=shard.bytes_in,
        peak_bytes=shard.peak_bytes,
        fresh=fresh,
    )
    return MergeDraft(task, identity)


def make_one_pass_task(scan: ScanTask, shard: MergeShard, draft: MergeDraft) -> OnePassTask:
    """Return the task that scans and merges a shard in one pass over its inputs.

    A stored object of the same name is read and compared: its digest is known too late for the
    driver to choose some of them.
    """
    return OnePassTask(
        scan=scan,
        merge=replace(draft, task=replace(draft.task, verify_reused=True)),
        peak_bytes=shard.peak_bytes + shard.bytes_out,
    )


def _find_math_library(method: Method, tensor: TensorTask, raw: MethodParameters) -> str:
    """Return the library that the bits of a tensor depend on, empty if they do not.

    A method of a third party that works on whole tensors may use any of its functions.
    """
    may_use_it = method.uses_math_library or digest_source(type(method)) is not None
    if tensor.granularity != "tensor" or not may_use_it:
        return ""
    parameters, _ = parse_parameters(method, raw)
    return describe_math_library(method.device(parameters))


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
        scanned=tuple(digests.pieces_of(shard, tensor) for tensor in shard.tensors),
        block_entries=plan.block_entries,
        num_bytes=shard.num_bytes,
        peak_bytes=shard.peak_bytes,
        fresh=fresh,
    )


def drop_checksums(task: BuildTask) -> BuildTask:
    """Return a task that compares what it reads by BLAKE3."""
    if isinstance(task, CopyTask):
        scanned = [tuple(replace(rows, checksum="") for rows in pieces) for pieces in task.scanned]
        return replace(task, scanned=tuple(scanned))
    if isinstance(task, (ScanTask, OnePassTask)):
        return task
    return replace(task, input_checksums=())
