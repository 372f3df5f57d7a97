"""The life of a store as a state machine, on memory, local folders and a bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from models import mutations
from models.mutations import Mutation
from models.store_life import StoreLife
from models.tiny_builds import TinyModels, simulated_world

from mmerge.manifests.stores.local import LocalStore

FACTOR = int(os.environ.get("MMERGE_MODEL_FACTOR", "1"))
"""How many times as many examples are tried as in continuous integration."""
PHASES = [Phase.generate, *([Phase.shrink] if "MMERGE_MODEL_SHRINK" in os.environ else [])]
"""Shrinking a failure takes minutes, so it is done on request only."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModels]:
    with simulated_world():
        tiny = TinyModels(tmp_path_factory.mktemp("models"))
        tiny.learn_truth()
        yield tiny


def try_lives(models: TinyModels, kind: str, *, examples: int, folder: Path) -> None:
    """Try lives of stores of one kind; raise what goes wrong in one."""
    numbers = iter(range(10**6))

    class Life(StoreLife):
        pass

    Life.models, Life.kind = models, kind
    if kind == "local":
        Life.make_medium = staticmethod(
            lambda: LocalStore.open(str(folder / str(next(numbers))), create=True)
        )
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            report_multiple_bugs=False,
            stateful_step_count=20,
            phases=PHASES,
            derandomize=FACTOR == 1,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("kind", "examples"), [("memory", 40), ("s3", 30), ("local", 8)])
def test_no_life_of_a_store_loses_or_changes_a_build(
    kind: str, examples: int, models: TinyModels, tmp_path: Path
) -> None:
    try_lives(models, kind, examples=examples * FACTOR, folder=tmp_path)


@pytest.mark.parametrize(
    ("mutation", "kind", "fault"),
    [
        (mutations.skip_record_checks, "memory", "was changed|of another digest"),
        (mutations.trust_inputs, "memory", "other bytes than its name stands for"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_life_of_a_store_finds_a_fault_that_is_put_back(
    mutation: Mutation, kind: str, fault: str, models: TinyModels, tmp_path: Path
) -> None:
    with mutation(), pytest.raises(AssertionError, match=fault):
        try_lives(models, kind, examples=200, folder=tmp_path)
