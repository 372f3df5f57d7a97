"""Process group of one composite: the collectives that its ranks use, over torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from mmerge.manifests.errors import PlacementError, RankLost, first_line

DEFAULT_TIMEOUT_S = 120.0
"""Seconds that a rank waits for the others before it gives up."""


class ProcessGroup:
    """A group of one process: every collective returns its input.

    All ranks call the same collectives in the same order.
    """

    rank = 0
    num_ranks = 1

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of tensors of one shape, with the same bits on every rank."""
        return values

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the ranks' tensors [..., width], concatenated in their last dimension."""
        return values

    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        """Return this rank's bytes, uint8 [num_bytes], of one part per rank held by `source`.

        Other ranks pass None. Parts are consumed one by one, each sent before the next is made, so
        that `source` never holds all of them.
        """
        assert parts is not None
        return next(iter(parts))

    def broadcast(self, values: torch.Tensor, *, source: int) -> torch.Tensor:
        """Return the tensor of rank `source`.

        The other ranks pass a tensor of the same shape and dtype, which is overwritten.
        """
        return values

    def broadcast_object(self, value: Any, *, source: int) -> Any:
        """Return the small Python object of rank `source`."""
        return value

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the small Python object of every rank, by rank."""
        return [value]

    def close(self, *, wait: bool = True) -> None:
        """Destroy the group, after a barrier if `wait`. A rank that failed does not wait."""


class TorchProcessGroup(ProcessGroup):
    """A process group of torch.distributed. A lost peer raises RankLost on every other rank."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = distributed.get_rank(group)
        self.num_ranks = distributed.get_world_size(group)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """See ProcessGroup. On the CPU 16-bit tensors are summed in float32 and rounded once."""
        if values.device.type == "cpu" and values.dtype != torch.float32:
            return self.all_reduce(values.to(torch.float32)).to(values.dtype)
        values = values.contiguous()
        self._guard(lambda: distributed.all_reduce(values, group=self._group))
        return values

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """See ProcessGroup."""
        raw = values.contiguous().view(torch.uint8)
        gathered = [torch.empty_like(raw) for _ in range(self.num_ranks)]
        self._guard(lambda: distributed.all_gather(gathered, raw, group=self._group))
        return torch.cat([part.view(values.dtype) for part in gathered], dim=-1)

    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        """See ProcessGroup."""
        device = self._device()
        if parts is None:
            received = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._guard(lambda: distributed.recv(received, src=source, group=self._group))
            return received
        local_part: torch.Tensor | None = None
        for rank, part in enumerate(parts):
            if rank == self.rank:
                local_part = part.to(device)
            else:
                self._send(part.to(device), rank)
            del part  # the generator makes the next part once nothing holds this one
        assert local_part is not None
        return local_part

    def broadcast(self, values: torch.Tensor, *, source: int) -> torch.Tensor:
        """See ProcessGroup."""
        raw = values.contiguous().view(torch.uint8)
        self._guard(lambda: distributed.broadcast(raw, src=source, group=self._group))
        return raw.view(values.dtype)

    def broadcast_object(self, value: Any, *, source: int) -> Any:
        """See ProcessGroup."""
        values = [value]
        self._guard(
            lambda: distributed.broadcast_object_list(values, src=source, group=self._group)
        )
        return values[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """See ProcessGroup."""
        values: list[Any] = [None] * self.num_ranks
        self._guard(lambda: distributed.all_gather_object(values, value, group=self._group))
        return values

    def close(self, *, wait: bool = True) -> None:
        """See ProcessGroup."""
        if not distributed.is_initialized():
            return
        if wait:  # a rank that tears down while a peer still sends to it can abort at exit
            self._guard(lambda: distributed.barrier(group=self._group))
        distributed.destroy_process_group()

    def _send(self, values: torch.Tensor, rank: int) -> None:
        self._guard(lambda: distributed.send(values, dst=rank, group=self._group))

    def _device(self) -> torch.device:
        if distributed.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _guard(self, collective: Callable[[], Any]) -> None:
        """Run a collective; raise RankLost where a peer closed its connection."""
        try:
            collective()
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer
            reason = first_line(error)
            raise RankLost(
                f"rank {self.rank} of {self.num_ranks}: another rank of this composite ended or did"
                f" not answer ({reason}). Its own message says why; start all ranks again"
            ) from error


def check_device(name: str) -> None:
    """Raise PlacementError where this process has no device of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PlacementError(
            f"device {name!r}: torch knows no such device. Take cpu, cuda or cuda:1"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlacementError(
            f"device {name!r}: torch finds no CUDA GPU in this process. Take --device cpu, or a"
            " machine that has one"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlacementError(
            f"device {name!r}: this process has {torch.cuda.device_count()} CUDA GPUs, numbered"
            " from 0. Take one of them"
        )


def in_torchrun() -> bool:
    """Return whether torchrun, or a similar launcher, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def open_process_group(
    *, device: str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S
) -> ProcessGroup:
    """Return the process group of this process, from the variables that torchrun sets.

    Without those variables it is a group of one. nccl connects CUDA devices (each rank takes the
    device of its LOCAL_RANK), gloo everything else.

    Raises:
        PlacementError: this process has no such device.
        RankLost: the other ranks did not connect within `timeout_s` seconds.
    """
    if distributed.is_initialized():
        return TorchProcessGroup()
    if not in_torchrun():
        return ProcessGroup()
    # Functions of this module bind the default group as a default argument at import, and models of
    # transformers import it. Imported after the group exists, they would keep it alive past its
    # end, and its threads sometimes abort the process at exit.
    import torch.distributed.nn

    is_cuda = device.startswith("cuda")
    if is_cuda:
        rank_device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        check_device(rank_device)
        torch.cuda.set_device(rank_device)
    try:
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise RankLost(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}: the others did not"
            f" connect ({reason}). Start all ranks again"
        ) from error
    return TorchProcessGroup()
