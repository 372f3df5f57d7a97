"""The simulation of drivers, leases, references, collections and a store, from fixed seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from models.replay import ReplayedModels
from models.simulation import STEPS_PER_EPISODE, Episode, make_models, simulate
from models.tiny_builds import simulated_world

FACTOR = int(os.environ.get("MMERGE_MODEL_FACTOR", "1"))
STEPS = int(os.environ.get("MMERGE_MODEL_STEPS", "100000"))
"""Store calls; continuous integration makes a million, in about a minute of one core."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayedModels]:
    with simulated_world():
        yield make_models(tmp_path_factory.mktemp("models"))


def test_no_seed_loses_a_build_or_gives_a_number_two_meanings(models: ReplayedModels) -> None:
    num_steps, num_episodes, outcomes = simulate(models, first_seed=0, steps=STEPS * FACTOR)
    assert num_steps >= STEPS
    assert num_episodes > 10
    for outcome in ("run done", "gc done", "gc StoreError", "delete done", "reader done"):
        assert outcomes[outcome] >= 5, outcomes


def test_equal_seeds_give_equal_episodes_and_others_do_not(models: ReplayedModels) -> None:
    first, second, third = (
        Episode(models, seed, steps=STEPS_PER_EPISODE).run() for seed in (3, 3, 4)
    )
    assert first == second
    assert first != third
