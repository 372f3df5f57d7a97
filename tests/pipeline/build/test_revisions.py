"""Objects are not reused where a method corrected its arithmetic for a recipe's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.workers.methods import find_method
from mmerge.workers.methods.della import RankedDrop
from mmerge.workers.methods.interface import MethodParameters, identify_parameters


def count_reused_and_merged(lab: Any, raw: dict[str, Any]) -> tuple[int, int]:
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    report = run(plan, executor=SerialExecutor(num_threads=1))
    num_merged = report.num_computed.get("merge", 0)
    return len(plan.merge_shards) - num_merged, num_merged


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("epsilon", [None, 0.25])
def test_della_merges_again_what_was_merged_without_the_epsilon_of_an_expert(
    lab: Any, monkeypatch: pytest.MonkeyPatch, method: str, epsilon: float | None
) -> None:
    raw = lab.make_all() | {"method": method, "epsilon": 0.1}
    if epsilon is not None:
        raw["experts"]["audio"]["epsilon"] = epsilon

    def first_revision(self: RankedDrop, parameters: Any, experts: Sequence[Any]) -> int:
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(RankedDrop, "revision", first_revision)
        count_reused_and_merged(lab, raw)
    num_reused, num_merged = count_reused_and_merged(lab, raw)
    assert (num_reused == 0) == (epsilon is not None)
    assert (num_merged == 0) == (epsilon is None)


def test_parameters_without_a_correction_are_identified_as_before() -> None:
    method = find_method("della")
    parameters = {"epsilon": 0.1}
    for expert in ({}, {"epsilon": 0.1}):
        assert identify_parameters(method, MethodParameters(parameters, (expert,))) == [
            parameters,
            [expert],
        ]
    corrected = MethodParameters(parameters, ({"epsilon": 0.3},))
    assert identify_parameters(method, corrected) == [parameters, [{"epsilon": 0.3}], 1]
