"""A composite on several Ray actors, one per device: tensor parallel, as with torchrun."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from types import TracebackType
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mmerge.manifests.errors import MmergeError, PlacementError, RankLost
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.workers.composite.loaded import LoadReport
from mmerge.workers.composite.loader import Mode, load_composite
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.process_group import (
    DEFAULT_TIMEOUT_S,
    ProcessGroup,
    open_process_group,
)
from mmerge.workers.composite.routed_linear import Policy
from mmerge.workers.modalities.prompt import Part

GRACE_S = 10.0
"""Seconds to wait for the errors of the other ranks: the first to arrive need not be the cause."""
START_TIMEOUT_S = 300.0


class RankActor:
    """One rank: a process with one device that makes the same calls as the others."""

    def __init__(self) -> None:
        self._process_group = ProcessGroup()
        self._composite: Composite | None = None

    def find_place(self) -> tuple[str, int]:
        """Return this node's address and a free port, where rank 0 lets the others connect."""
        with socket.socket() as free:
            free.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(free.getsockname()[1])

    def find_pid(self) -> int:
        """Return the process id of this rank."""
        return os.getpid()

    def load(
        self,
        uri: str,
        *,
        rank: int,
        num_ranks: int,
        place: tuple[str, int],
        timeout_s: float,
        options: dict[str, Any],
    ) -> None:
        """Join the process group and load this rank's part.

        Sets the environment variables that torchrun sets; Ray shows every actor its own GPU as the
        first, hence LOCAL_RANK 0.
        """
        address, port = place
        names = {
            "RANK": rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": num_ranks,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in names.items()})
        self._process_group = open_process_group(device=options["device"], timeout_s=timeout_s)
        self._composite = load_composite(uri, group=self._process_group, **options)

    def reports(self) -> tuple[LoadReport, ...]:
        """Return what every rank read."""
        assert self._composite is not None
        return self._composite.load_reports

    def prompt(self, question: str, media: Sequence[Part]) -> list[Part]:
        """See Composite."""
        assert self._composite is not None
        return self._composite.prompt(question, media)

    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """See Composite; on the CPU, float32 for halves."""
        assert self._composite is not None
        return self._composite.logits(parts).cpu()

    def generate_batch(
        self, prompts: Sequence[Sequence[Part]], options: dict[str, Any]
    ) -> list[str]:
        """See Composite."""
        assert self._composite is not None
        return self._composite.generate_batch(prompts, **options)

    def close(self) -> None:
        """Leave the process group."""
        self._process_group.close()


class ActorComposite:
    """A composite on actors, made by `load_on_actors`.

    A rank that fails to load or dies ends all of them, with one error. Threads may share it: all
    ranks must receive calls in the same order, so one call is made at a time.
    """

    def __init__(self, actors: Sequence[Any], group: Any, executor: RayExecutor) -> None:
        self._actors, self._group, self._executor = list(actors), group, executor
        self._turn = Lock()
        self.load_reports: tuple[LoadReport, ...] = ()
        """Of every rank, by rank."""

    def prompt(self, question: str, media: Sequence[Part] = ()) -> list[Part]:
        """Return the parts of a prompt in the form that the recipe's templates give it."""
        with self._turn:
            prompts = self._gather(
                [actor.prompt.remote(question, list(media)) for actor in self._actors[:1]]
            )
        parts: list[Part] = prompts[0]
        return parts

    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """Return the logits of every position of a prompt, [tokens, vocabulary].

        The actors read the files, on their nodes.
        """
        logits: torch.Tensor = self._call("logits", list(parts))[0]
        return logits

    def generate_batch(
        self, prompts: Sequence[Sequence[Part]], *, max_new_tokens: int = 64, **options: Any
    ) -> list[str]:
        """Return one answer per prompt. Options and errors as of `Composite.generate_batch`."""
        all_options = {"max_new_tokens": max_new_tokens} | options
        prompt_lists = [list(parts) for parts in prompts]
        answers: list[str] = self._call("generate_batch", prompt_lists, all_options)[0]
        return answers

    def close(self) -> None:
        """End the actors and release their devices."""
        actors, self._actors = self._actors, []
        if not actors:
            return
        with suppress(ray.exceptions.RayError):
            ray.get([actor.close.remote() for actor in actors], timeout=GRACE_S)
        self._end(actors)

    def __enter__(self) -> ActorComposite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, actors: Sequence[Any]) -> None:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(self._group)
        self._executor.close()

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        with self._turn:
            return self._gather([getattr(actor, name).remote(*arguments) for actor in self._actors])

    def _gather(self, waiting: Sequence[Any]) -> list[Any]:
        """Return the results of all ranks.

        If a rank died or only some failed, end all of them and raise the error nearest to the
        cause.
        """
        if not waiting:
            raise RankLost("this composite's actors have ended; load it again")
        failures: dict[int, BaseException] = {}
        left, until = list(waiting), None
        while left and (until is None or time.monotonic() < until):
            ready, left = ray.wait(
                left, timeout=None if until is None else max(0.0, until - time.monotonic())
            )
            for reference in ready:
                try:
                    ray.get(reference)
                except (RayTaskError, ActorDiedError, ActorUnavailableError) as error:
                    failures[list(waiting).index(reference)] = error
                    until = until or time.monotonic() + GRACE_S
        if not failures:
            return list(ray.get(list(waiting)))
        rank, failure = _choose(failures)
        cause = _cause(failure)
        if (
            not isinstance(cause, MmergeError)
            or isinstance(cause, RankLost)
            or len(failures) < len(waiting)
        ):
            actors, self._actors = self._actors, []
            self._end(actors)
        if isinstance(failure, (ActorDiedError, ActorUnavailableError)):
            first = str(failure).strip().splitlines()[0]
            raise RankLost(
                f"rank {rank} of {len(waiting)}: its Ray actor ended ({first}). The others were"
                " ended too; load again"
            ) from failure
        raise cause from failure


def _choose(failures: dict[int, BaseException]) -> tuple[int, BaseException]:
    """Return rank and error nearest to the cause.

    An actor that ended comes first, consequences of another rank's end come last.
    """

    def distance(item: tuple[int, BaseException]) -> tuple[int, int]:
        rank, error = item
        if isinstance(error, (ActorDiedError, ActorUnavailableError)):
            return 0, rank
        return (2 if isinstance(_cause(error), RankLost) else 1), rank

    return min(failures.items(), key=distance)


def _cause(error: BaseException) -> BaseException:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error


def load_on_actors(
    uri: str,
    *,
    num_ranks: int,
    address: str | None = None,
    mode: Mode = "expansion",
    expert: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    policy: Policy = "packed",
    cpus_per_rank: float = 1,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ActorComposite:
    """Return the composite at `uri` on Ray actors, each with a part of every matrix.

    The actors form one placement group (strategy PACK).

    Args:
        uri: as of `load_composite`; every node must see it.
        num_ranks: actors, and GPUs with `device="cuda"`.
        address: of the Ray cluster; the one that this process is connected to or RAY_ADDRESS, else
            a local one, if absent.
        mode, expert, dtype, policy: as of `load_composite`.
        device: `cpu` (gloo) or `cuda` (nccl; one GPU per actor).
        cpus_per_rank: cores that Ray counts for each.
        timeout_s: seconds that a rank waits for the others before it gives up.

    Raises:
        PlacementError: the cluster has not the cores or GPUs, or the model cannot be divided over
            so many ranks.
        RankLost: an actor ended.
        ManifestError, StoreError, CheckpointError: as of `load_composite`.
    """
    executor = RayExecutor(address=address)
    executor.connect()
    bundle = {"CPU": cpus_per_rank} | ({"GPU": 1.0} if device == "cuda" else {})
    group = placement_group([bundle] * num_ranks, strategy="PACK")
    _await_group(group, bundle, num_ranks, executor)
    actor_class = ray.remote(num_cpus=cpus_per_rank, num_gpus=bundle.get("GPU", 0))(RankActor)
    actors = [
        actor_class.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            )
        ).remote()
        for rank in range(num_ranks)
    ]
    composite = ActorComposite(actors, group, executor)
    try:
        place = composite._gather([actors[0].find_place.remote()])[0]
        options = {
            "mode": mode,
            "expert": expert,
            "device": device,
            "dtype": dtype,
            "policy": policy,
        }
        shared = {
            "num_ranks": num_ranks,
            "place": place,
            "timeout_s": timeout_s,
            "options": options,
        }
        composite._gather(
            [actor.load.remote(uri, rank=rank, **shared) for rank, actor in enumerate(actors)]
        )
        composite.load_reports = composite._gather([actors[0].reports.remote()])[0]
    except BaseException:
        composite.close()
        raise
    return composite


def _await_group(
    group: Any, bundle: dict[str, float], num_ranks: int, executor: RayExecutor
) -> None:
    """Wait until the placement group has its devices.

    Raises:
        PlacementError: after a timeout, or at once if the cluster can never have them.
    """
    total = ray.cluster_resources()
    lacking = [name for name, amount in bundle.items() if total.get(name, 0) < amount * num_ranks]
    if not lacking and group.wait(timeout_seconds=START_TIMEOUT_S):
        return
    remove_placement_group(group)
    executor.close()
    needed = ", ".join(f"{amount * num_ranks:g} {name}" for name, amount in bundle.items())
    available = ", ".join(f"{total.get(name, 0):g} {name}" for name in bundle)
    state = (
        "has" if lacking else f"did not have them free within {START_TIMEOUT_S:g} s; in all it has"
    )
    raise PlacementError(
        f"{num_ranks} ranks need {needed}; the Ray cluster {state} {available}. Use fewer ranks,"
        " or a larger cluster"
    )
