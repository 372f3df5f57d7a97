"""Routing: which modality each position of the running forward pass belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, local
from typing import Any

import torch
from torch import nn

from mmerge.workers.composite.token_groups import TokenGroup, make_groups

TEXT = -1
"""Modality id of text tokens, generated ones included. Expert i of a composite has the id i."""


class Routing:
    """Modality of each position of the running forward pass, shared by all layers of a model.

    Groups are computed once per pass, not once per layer: on a GPU each computation is a
    synchronisation with the device.

    Call order: `follow` once per model; then, per prompt, `prefill` around the passes. A
    pre-forward hook of the model sets the groups ahead of every pass; layers read `groups`.

    Layers know one prompt only, so one thread at a time runs the model: `turn` is held by
    `prefill`, by every pass of a model that is followed, and by callers for longer, from the
    encoding of a prompt to the decoding of its answer.
    """

    def __init__(self) -> None:
        self._make_turn()
        self._modality_ids: torch.Tensor | None = None
        self._prompt_ids: torch.Tensor | None = None
        self._scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.groups: tuple[TokenGroup, ...] | None = None
        """Tokens of each modality; None where all are text."""

    @property
    def modality_ids(self) -> torch.Tensor | None:
        """Modality of each token, int64 [batch, tokens]; None outside of a prefill."""
        return self._modality_ids

    @modality_ids.setter
    def modality_ids(self, modality_ids: torch.Tensor | None) -> None:
        self._modality_ids = modality_ids
        groups = () if modality_ids is None else make_groups(modality_ids)
        self.groups = groups if any(group.modality != TEXT for group in groups) else None
        if self.groups is None:
            self._scratch.clear()

    def _make_turn(self) -> None:
        self.turn = RLock()
        """Held by the thread whose prompt is processed; reentrant."""
        self._passes = local()
        """`depth`: running passes of this thread, each of which has acquired the turn."""

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied: a copy of a model gets a turn of its own.
        excluded = ("turn", "_passes")
        return {name: value for name, value in self.__dict__.items() if name not in excluded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_turn()

    def scratch(self, shape: tuple[int, int], *, like: torch.Tensor) -> torch.Tensor:
        """Return scratch memory of this shape, with the device and dtype of `like`.

        Every block of weights of a prefill uses the same memory, which stays in a cache; new memory
        would cost a page fault per page. It is freed when the prefill ends.
        """
        num_entries = shape[0] * shape[1]
        key = like.device, like.dtype
        memory = self._scratch.get(key)
        if memory is None or len(memory) < num_entries:
            memory = torch.empty(num_entries, dtype=like.dtype, device=like.device)
            self._scratch[key] = memory
        return memory[:num_entries].view(shape)

    def check(self, inputs: torch.Tensor) -> None:
        """Raise ValueError where `inputs` [batch, tokens, width] are not the tokens routed for."""
        if self._modality_ids is not None and self._modality_ids.shape != inputs.shape[:-1]:
            raise ValueError(
                f"routing is for tokens {tuple(self._modality_ids.shape)}, the layer got"
                f" {tuple(inputs.shape[:-1])}"
            )

    @contextmanager
    def prefill(self, modality_ids: torch.Tensor) -> Iterator[None]:
        """Route the passes inside the context by the ids of a prompt, int64 [batch, tokens].

        Outside, every token is text. A model that this routing follows may process the prompt in
        chunks; tokens after the prompt are text. One thread at a time is inside.
        """
        with self.turn:
            self._prompt_ids = self.modality_ids = modality_ids
            try:
                yield
            finally:
                self._prompt_ids = self.modality_ids = None

    def follow(self, model: nn.Module) -> None:
        """Set the modality of each token ahead of every forward pass of a language model."""
        # The hook refers to the routing and not to its owner: a model on a reference cycle would
        # keep its memory until the garbage collector runs.
        model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        model.register_forward_hook(self._end_pass, always_call=True)

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take the turn for one pass: a thread that calls the model itself waits for the others."""
        self.turn.acquire()
        self._passes.depth = getattr(self._passes, "depth", 0) + 1
        self._route(args, kwargs)

    def _end_pass(self, module: nn.Module, args: Any, outputs: Any) -> None:
        """Release the turn after a pass, or its failure.

        Called too where another hook failed before the turn was taken, hence the count.
        """
        depth = getattr(self._passes, "depth", 0)
        if depth:
            self._passes.depth = depth - 1
            self.turn.release()

    def _route(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Set the modality ids of the positions of one forward pass.

        The prompt may come in one pass or in chunks; with beams or several answers per prompt each
        of its rows is repeated.
        """
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        if self._prompt_ids is None or inputs is None or start >= self._prompt_ids.shape[1]:
            self.modality_ids = None
            return
        num_rows, num_tokens = inputs.shape[:2]
        ids = self._prompt_ids[:, start : start + num_tokens]
        ids = torch.nn.functional.pad(ids, (0, num_tokens - ids.shape[1]), value=TEXT)
        self.modality_ids = ids.repeat_interleave(num_rows // len(ids), dim=0)
