"""Faults that were once in the product, put back: each is found by a model, from a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from models import mutations
from models.mutations import Mutation
from models.replay import ReplayedModels
from models.simulation import STEPS_PER_EPISODE, Episode, Fault, make_models
from models.test_exploration import explore
from models.tiny_builds import simulated_world

SEEDS = range(60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayedModels]:
    with simulated_world():
        yield make_models(tmp_path_factory.mktemp("models"))


def find_by_simulation(models: ReplayedModels) -> str:
    """Return the first fault that an episode finds, empty if none does."""
    for seed in SEEDS:
        try:
            Episode(models, seed, steps=STEPS_PER_EPISODE).run()
        except Fault as fault:
            return str(fault)
    return ""


@pytest.mark.parametrize(
    ("mutation", "fault"),
    [
        (mutations.reuse_deleted_numbers, "now means"),
        (mutations.replace_builds, "was replaced"),
        (mutations.commit_without_fence, "lacks"),
        (mutations.forget_shared_objects, "which a live build needs"),
        (mutations.ignore_lapse_and_fences, "which a live build needs"),
    ],
    ids=lambda value: getattr(value, "__name__", "fault"),
)
def test_the_simulation_finds_a_fault_that_is_put_back(
    mutation: Mutation, fault: str, models: ReplayedModels
) -> None:
    with mutation():
        assert fault in find_by_simulation(models)


@pytest.mark.parametrize(
    ("mutation", "names"),
    [
        (mutations.reuse_deleted_numbers, ("refer to first", "refer to others and gc")),
        (mutations.commit_without_fence, ("first", "gc")),
    ],
    ids=["reuse_deleted_numbers", "commit_without_fence"],
)
def test_the_exploration_finds_a_fault_that_is_put_back(
    mutation: Mutation, names: tuple[str, ...]
) -> None:
    with simulated_world(), mutation():
        assert explore(*names, jumps=1)
