"""Provenance of merged objects: short input digests, which explain why a shard is recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.entry import ObjectEntry, ShardEntry
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.build.method_stages import to_hex
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import MergeTask

NUMBERS, THRESHOLDS, BASE = "numbers", "thresholds", "base"
EXPERT_PREFIX = "expert:"


def describe_inputs(
    plan: MergePlan, digests: InputDigests, tasks: Sequence[MergeTask]
) -> dict[str, dict[str, str]]:
    """Return the short input digests of each merge shard.

    The inputs are the base, every expert, the hyper-parameters and the trim thresholds.
    """
    recipe = plan.recipe
    names = [BASE, *(EXPERT_PREFIX + expert.name for expert in recipe.experts)]
    parameters = [
        recipe.describe_parameters(),
        *(recipe.describe_parameters(expert.name) for expert in recipe.experts),
    ]
    numbers = digest_json([recipe.method, parameters, plan.dtype])
    inputs = {}
    for task in tasks:
        pieces = [digests.describe(tensor) for tensor in task.tensors]
        sources = {
            name: digest_json([piece[position] for piece in pieces])
            for position, name in enumerate(names)
        }
        thresholds = digest_json(
            [[value.hex() for value in values] for values in task.thresholds]
            + [to_hex(values) for values in task.earlier_results]
        )
        inputs[task.shard] = sources | {NUMBERS: numbers, THRESHOLDS: thresholds}
    return inputs


def add_inputs(
    entries: Sequence[ShardEntry], inputs: Mapping[str, dict[str, str]]
) -> list[ShardEntry]:
    """Return the entries with what `describe_inputs` found of their shards."""
    return [
        entry.model_copy(
            update={
                "object": entry.object.model_copy(update={"inputs": inputs.get(entry.object.shard)})
            }
        )
        for entry in entries
    ]


def explain(old: ObjectEntry | None, new: Mapping[str, str]) -> str:
    """Return why a shard with these inputs is not the object that an earlier build has of it."""
    if old is None or old.inputs is None:
        return "no earlier build of this name has it"
    reasons = []
    if old.inputs.get(BASE) != new.get(BASE):
        reasons.append("the base changed")
    before, after = (
        {
            key.removeprefix(EXPERT_PREFIX): value
            for key, value in digests.items()
            if key.startswith(EXPERT_PREFIX)
        }
        for digests in (old.inputs, new)
    )
    for name in after:
        if name not in before:
            reasons.append(f"expert {name!r} is new")
        elif before[name] != after[name]:
            reasons.append(f"expert {name!r} changed")
    reasons += [f"expert {name!r} is gone" for name in before if name not in after]
    if old.inputs.get(NUMBERS) != new.get(NUMBERS):
        reasons.append("numbers of the recipe changed")
    if old.inputs.get(THRESHOLDS) != new.get(THRESHOLDS):
        reasons.append("trim thresholds moved")
    return ", ".join(reasons) or "its object is gone, or mmerge changed its arithmetic"
