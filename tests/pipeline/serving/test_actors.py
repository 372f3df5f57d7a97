"""Ray actors hold one composite and give what one process gives; one that dies ends all, with one
error.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import build_masks
from rank_script import make_prompts

from mmerge.manifests.errors import ManifestError, PlacementError, PromptError, RankLost
from mmerge.pipeline import Part, load_composite, load_on_actors
from mmerge.pipeline.execution.ray_executor import RayExecutor

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    executor = RayExecutor(num_workers=2)
    # Actors are new processes: they find the tests' own modules only if told where.
    executor.connect()
    yield
    executor.close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_masks(
        tmp_path_factory.mktemp("composite"), "llama", hidden_size=64, intermediate_size=128
    )


def test_two_actors_give_what_one_process_gives_and_share_the_reading(uri: str) -> None:
    alone = load_composite(uri, dtype=torch.float32)
    prompts = make_prompts(alone.language_model.config.hidden_size)
    with load_on_actors(uri, num_ranks=2, dtype=torch.float32) as composite:
        for prompt in prompts:
            # Sums over ranks are added in another order than within one matrix: float32, for logits
            # of about 1.
            torch.testing.assert_close(
                composite.logits(prompt), alone.logits(prompt), rtol=1e-5, atol=1e-5
            )
        assert composite.generate_batch(prompts, max_new_tokens=4) == alone.generate_batch(
            prompts, max_new_tokens=4
        )
        read = [report.bytes_read for report in composite.load_reports]
        assert sum(read) == alone.load_reports[0].bytes_read
        assert max(read) < 1.15 * sum(read) / 2
        with pytest.raises(PromptError, match="width 3"):
            composite.generate_batch([[Part("image", torch.zeros(2, 3))]])
        # A prompt that all ranks refuse leaves them at work.
        assert composite.generate_batch(prompts[:1], max_new_tokens=1)


def test_an_actor_that_dies_is_one_clear_error_and_no_hang(uri: str) -> None:
    composite = load_on_actors(uri, num_ranks=2, dtype=torch.float32)
    prompts = make_prompts(64)
    import ray

    pid = ray.get(composite._actors[1].find_pid.remote())
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2: its Ray actor ended"):
        composite.logits(prompts[0])
    assert time.monotonic() - began < 60
    with pytest.raises(RankLost, match="have ended; load it again"):
        composite.logits(prompts[0])


def test_more_ranks_than_the_cluster_has_cores_for_are_refused_with_the_numbers(uri: str) -> None:
    with pytest.raises(PlacementError, match="64 ranks need 64 CPU; the Ray cluster has 2 CPU"):
        load_on_actors(uri, num_ranks=64)


def test_what_a_rank_finds_wrong_with_the_build_is_the_error_that_is_raised(uri: str) -> None:
    with pytest.raises(ManifestError, match="nobody"):
        load_on_actors(uri, num_ranks=2, mode="retention", expert="nobody")


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        load_on_actors(str(tmp_path / "nowhere"), num_ranks=2)
