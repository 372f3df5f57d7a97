"""The processes that hold one composite together, and the few ways in which they exchange tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from mmerge.manifests.errors import PlacementError, RankLost

DEFAULT_TIMEOUT_S = 120.0
"""Seconds that a rank waits for the others before it gives up."""


class Ranks:
    """One process alone: every exchange returns what it was given."""

    rank = 0
    num_ranks = 1

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of tensors of one shape, the same bits on every rank."""
        return values

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """Return the ranks' tensors [..., width] next to each other in their last dimension."""
        return values

    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        """Return this rank's bytes (uint8 [num_bytes]) of those that rank `source` has, one per
        rank; the others give None.

        The parts are taken one after the other, and each is sent before the next is taken.
        """
        assert parts is not None
        return next(iter(parts))

    def broadcast(self, values: torch.Tensor, *, source: int) -> torch.Tensor:
        """Return rank `source`'s tensor; the others give one of the same shape and dtype, which is
        overwritten.
        """
        return values

    def share(self, value: Any, *, source: int) -> Any:
        """Return rank `source`'s small Python object."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """Return every rank's small Python object, by rank."""
        return [value]

    def close(self, *, wait: bool = True) -> None:
        """End the exchange; `wait` for the others first, unless this rank has failed."""


class ProcessRanks(Ranks):
    """Processes of torch.distributed. A rank that is gone is one error on each of the others, never
    a wait without end.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = distributed.get_rank(group)
        self.num_ranks = distributed.get_world_size(group)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """See Ranks. On the CPU halves are added in float32: the sum is rounded once."""
        if values.device.type == "cpu" and values.dtype != torch.float32:
            return self.add(values.to(torch.float32)).to(values.dtype)
        values = values.contiguous()
        self._guard(lambda: distributed.all_reduce(values, group=self._group))
        return values

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        raw = values.contiguous().view(torch.uint8)
        found = [torch.empty_like(raw) for _ in range(self.num_ranks)]
        self._guard(lambda: distributed.all_gather(found, raw, group=self._group))
        return torch.cat([each.view(values.dtype) for each in found], dim=-1)

    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        """See Ranks."""
        device = self._device()
        if parts is None:
            received = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._guard(lambda: distributed.recv(received, src=source, group=self._group))
            return received
        own: torch.Tensor | None = None
        for rank, part in enumerate(parts):
            if rank == self.rank:
                own = part.to(device)
            else:
                self._send(part.to(device), rank)
            del part  # the next is made only when nothing holds this one
        assert own is not None
        return own

    def broadcast(self, values: torch.Tensor, *, source: int) -> torch.Tensor:
        """See Ranks."""
        raw = values.contiguous().view(torch.uint8)
        self._guard(lambda: distributed.broadcast(raw, src=source, group=self._group))
        return raw.view(values.dtype)

    def share(self, value: Any, *, source: int) -> Any:
        """See Ranks."""
        held = [value]
        self._guard(lambda: distributed.broadcast_object_list(held, src=source, group=self._group))
        return held[0]

    def collect(self, value: Any) -> list[Any]:
        """See Ranks."""
        found: list[Any] = [None] * self.num_ranks
        self._guard(lambda: distributed.all_gather_object(found, value, group=self._group))
        return found

    def close(self, *, wait: bool = True) -> None:
        """See Ranks."""
        if distributed.is_initialized():
            if wait:  # a rank that tears down while another still talks to it can abort at its exit
                self._guard(lambda: distributed.barrier(group=self._group))
            distributed.destroy_process_group()

    def _send(self, values: torch.Tensor, rank: int) -> None:
        self._guard(lambda: distributed.send(values, dst=rank, group=self._group))

    def _device(self) -> torch.device:
        if distributed.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _guard(self, exchange: Any) -> None:
        try:
            exchange()
        except (
            RuntimeError
        ) as error:  # torch raises nothing narrower for a peer that closed its connection
            first = str(error).strip().splitlines()[0]
            raise RankLost(
                f"rank {self.rank} of {self.num_ranks}: another rank of this composite ended or did"
                f" not answer ({first}). Its own message says why; start all ranks again"
            ) from error


def check_device(device: str) -> None:
    """Raise PlacementError where this process has no device of that name."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise PlacementError(
            f"device {device!r}: torch knows no such device. Take cpu, cuda or cuda:1"
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PlacementError(
            f"device {device!r}: torch finds no CUDA GPU in this process. Take --device cpu, or a"
            " machine that has one"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PlacementError(
            f"device {device!r}: this process has {torch.cuda.device_count()} CUDA GPUs, numbered"
            " from 0. Take one of them"
        )


def in_torchrun() -> bool:
    """Return whether this process was started by torchrun, or an equal, as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def open_ranks(*, device: str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S) -> Ranks:
    """Return the ranks that this process belongs to, by the variables that torchrun sets; one alone
    where there are none.

    nccl connects CUDA devices (each rank takes the device of its LOCAL_RANK), gloo everything else.

    Raises:
        PlacementError: this process has no such device.
        RankLost: the other ranks did not come within `timeout_s` seconds.
    """
    if distributed.is_initialized():
        return ProcessRanks()
    if not in_torchrun():
        return Ranks()
    # This module's functions have the default group, as it is when they are imported (models of
    # transformers do that), as a default: a group made before would live on in them behind its end,
    # and its threads abort a process at its exit now and then.
    import torch.distributed.nn

    is_cuda = device.startswith("cuda")
    if is_cuda:
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        check_device(own)
        torch.cuda.set_device(own)
    try:
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise RankLost(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}: the others did not"
            f" come ({first}). Start all ranks again"
        ) from error
    return ProcessRanks()
