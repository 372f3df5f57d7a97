"""The simulator drives the builds of a run: every phase of every method, with real costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmerge.manifests.errors import ManifestError
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.build.simulation import Rates, simulate, to_rates
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.simulated_cluster import Nodes
from mmerge.pipeline.monitoring.run_records import PhaseStatus, RunStatus

NODES = Nodes(1, 1, 1e12, 1e12)
METHODS: list[dict[str, Any]] = [
    {"method": "linear"},
    {"method": "mmer", "scope": "model"},
    {"method": "mmer", "scope": "tensor"},
    {"method": "emr"},
    {"method": "pcb"},
    {"method": "breadcrumbs"},
    {"method": "model_stock"},
    {"method": "tall_masks"},
    {"method": "neuron_fusion"},
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: "-".join(changes.values()))
def test_a_simulation_has_the_tasks_of_the_run(lab: Any, changes: dict[str, Any]) -> None:
    raw = lab.make_all()
    del raw["method"]
    if changes["method"] == "neuron_fusion":  # takes one expert
        raw["experts"] = {"image": raw["experts"]["image"]}
    plan = make_plan(read_recipe(lab.write_recipe(raw | changes)))
    simulation = simulate(plan, NODES)
    report = run(plan, executor=SerialExecutor(num_threads=1))
    tasks = {phase.name: phase.num_tasks for phase in simulation.phases}
    assert tasks == {phase: count for phase, count in report.num_computed.items() if count}
    assert simulation.num_tasks == sum(report.num_computed.values())


def test_a_simulation_with_a_rate_for_thresholds_reads_the_inputs_again(lab: Any) -> None:
    lab.dtype = torch.float32
    raw = lab.make_all() | {"scope": "model"}
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    simulation = simulate(plan, NODES, rates=Rates(thresholds=1e9))
    report = run(plan, executor=SerialExecutor(num_threads=1))
    tasks = {phase.name: phase.num_tasks for phase in simulation.phases}
    assert tasks["thresholds"] == report.num_computed["thresholds"] > 0


def test_a_merge_may_begin_before_the_last_scan_where_thresholds_are_per_tensor(lab: Any) -> None:
    lab.config |= {"num_hidden_layers": 8}
    rates = Rates(task_seconds=0, phase_seconds=0, start_seconds=0)
    seconds = {}
    for scope in ("model", "tensor"):
        raw = lab.make_all() | {"scope": scope}
        plan = make_plan(read_recipe(lab.write_recipe(raw)))
        phases = {phase.name: phase for phase in simulate(plan, NODES, rates=rates).phases}
        seconds[scope] = phases["scan"].seconds
    assert seconds["tensor"] > seconds["model"], "scans alternate with merges"


def test_rates_follow_from_the_phases_of_a_run() -> None:
    phases = {
        "scan": PhaseStatus(bytes_read=100, seconds=2.0),
        "merge": PhaseStatus(bytes_read=100, seconds=4.0),
        "norms": PhaseStatus(bytes_read=30, seconds=1.0),
        "norms (exact)": PhaseStatus(bytes_read=30, seconds=2.0),
    }
    rates = to_rates(RunStatus(name="tiny", number=1, phases=phases))
    assert (rates.scan, rates.merge, rates.stages) == (50.0, 25.0, 20.0)
    assert rates.copy == Rates().copy
    with pytest.raises(ManifestError, match="computed nothing"):
        to_rates(RunStatus(name="tiny", number=1))


def test_phases_of_records_that_version_0_1_wrote_have_their_present_names() -> None:
    raw = {"survey": {"num_tasks": 3}, "merge": {}, "carry": {"num_done": 2}}
    status = RunStatus.model_validate({"name": "tiny", "number": 1, "phases": raw})
    assert list(status.phases) == ["scan", "merge", "copy"]
    assert status.phases["scan"].num_tasks == 3
