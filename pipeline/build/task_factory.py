"""From what is known of a shard to the task that makes its object; the task's digest names
everything that the object depends on.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmerge.manifests.digest import digest_json
from mmerge.pipeline.build.input_survey import InputSurvey
from mmerge.pipeline.build.method_stages import to_hex
from mmerge.pipeline.planning.plan import CopyShard, MergePlan, MergeShard
from mmerge.workers.methods.interface import Known
from mmerge.workers.task import CopyTask, MergeTask

ARITHMETIC_VERSION = 2
"""Raised when a change of a method or of an object's layout would change bytes: no older object is
then reused.
"""


def make_merge_task(
    plan: MergePlan,
    shard: MergeShard,
    survey: InputSurvey,
    thresholds: tuple[tuple[float, ...], ...],
    known: Mapping[str, Known],
    *,
    fresh: bool,
) -> MergeTask:
    """Return the task that merges a shard.

    Args:
        plan: to which the shard belongs.
        shard: whose inputs are surveyed.
        survey: what is known of them.
        thresholds: per tensor and expert; empty per tensor for methods that do not trim.
        known: by tensor, what the method's stages found.
        fresh: merge it again, whatever is in the store.
    """
    names = tuple(expert.name for expert in plan.recipe.experts)
    numbers = tuple(plan.numbers[tensor.name] for tensor in shard.tensors)
    found = tuple(known[tensor.name] for tensor in shard.tensors)
    identity = {
        "arithmetic": ARITHMETIC_VERSION,
        "method": plan.recipe.method,
        "experts": list(names),
        "dtype": plan.dtype,
        "tensors": [
            {
                "name": tensor.name,
                "row_start": tensor.row_start,
                "shape": list(tensor.base.spec.shape),
                "inputs": survey.describe(tensor),
                "parameters": [number.parameters, list(number.experts)],
                "thresholds": [value.hex() for value in values],
                "known": to_hex(numbers_found),
            }
            for tensor, number, values, numbers_found in zip(
                shard.tensors, numbers, thresholds, found, strict=True
            )
        ],
    }
    return MergeTask(
        digest=digest_json(identity), shard=shard.name, expert_names=names, tensors=shard.tensors, thresholds=thresholds,
        method=plan.recipe.method, numbers=numbers, known=found, dtype=plan.dtype,
        block_entries=plan.block_entries, num_bytes=shard.bytes_in, peak_bytes=shard.peak_bytes, fresh=fresh,
    )  # fmt: skip


def make_copy_task(
    plan: MergePlan, shard: CopyShard, survey: InputSurvey, *, fresh: bool
) -> CopyTask:
    """Return the task that copies a shard, all of whose inputs are surveyed."""
    identity = {
        "arithmetic": ARITHMETIC_VERSION,
        "role": shard.role,
        "tensors": [
            [
                tensor.name,
                tensor.role,
                tensor.row_start,
                tensor.source.spec.dtype,
                list(tensor.source.spec.shape),
                survey.digest_of(shard, tensor),
            ]
            for tensor in shard.tensors
        ],
    }
    # The expert's name is not part of the identity: two builds, or two experts, share what they
    # have in common.
    return CopyTask(
        digest=digest_json(identity), shard=shard.name, role=shard.role, expert="", tensors=shard.tensors,
        block_entries=plan.block_entries, num_bytes=shard.num_bytes, peak_bytes=shard.peak_bytes, fresh=fresh,
    )  # fmt: skip
