"""Faults that were once in the product, put back: each is found by a model.

`skip_record_checks` and `trust_inputs` are found by the state machine (test_store_life.py), all
others here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import mutations
from models.mutations import Mutation
from models.replay import ReplayedModels
from models.simulation import STEPS_PER_EPISODE, Episode, Fault, make_models
from models.test_exploration import A_DAY, FROZEN, explore
from models.tiny_builds import simulated_world

SEEDS = range(60)


def test_every_mutation_is_found_by_some_model() -> None:
    """The names of all mutations stand in the tests that let a model find them."""
    folder = Path(__file__).parent
    tests = [folder / "test_mutations.py", folder / "test_store_life.py"]
    used = set(re.findall(r"\(mutations\.([a-z_]+),", " ".join(map(Path.read_text, tests))))
    defined = {
        name
        for name, value in vars(mutations).items()
        if inspect.isfunction(value) and value.__module__ == mutations.__name__
    }
    assert defined == used


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
        (mutations.trust_writes, "is missing|is another build"),
        (mutations.trust_uploads, "has other bytes|was changed"),
        (mutations.take_conflicts_for_existing_objects, "which is another build"),
        (mutations.forget_own_record, "made the records"),
        (mutations.commit_without_fence, "lacks"),
        (mutations.forget_shared_objects, "which a live build needs"),
        (mutations.mark_once, "is missing|which a live build needs"),
    ],
    ids=lambda value: getattr(value, "__name__", "fault"),
)
def test_the_simulation_finds_a_fault_that_is_put_back(
    mutation: Mutation, fault: str, models: ReplayedModels
) -> None:
    with mutation():
        assert re.search(fault, find_by_simulation(models))


@pytest.mark.parametrize(
    ("mutation", "names", "options"),
    [
        (mutations.reuse_deleted_numbers, ("refer to first", "refer to others and gc"), {}),
        (mutations.commit_without_fence, ("first", "gc"), {}),
        (mutations.commit_without_entries, ("third", "interrupted gc"), {}),
        (mutations.never_lapse_in_commit, ("gc", "third"), A_DAY),
        (mutations.never_lapse_in_collection, ("third", "gc"), {}),
        (mutations.ignore_fences, ("third", "gc"), FROZEN),
        (mutations.ignore_lapse_and_fences, ("third", "gc"), {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_exploration_finds_a_fault_that_is_put_back(
    mutation: Mutation, names: tuple[str, ...], options: dict[str, Any]
) -> None:
    with simulated_world(), mutation():
        assert explore(*names, jumps=1, **options)
