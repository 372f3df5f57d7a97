"""Linear layers that multiply each token with the weights of its own modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal

import torch
from torch import nn

from mmerge.workers.composite.token_groups import Group, is_tracked, make_groups
from mmerge.workers.reconstruction.bitmask import unpack_rows
from mmerge.workers.reconstruction.masked_weights import can_form, can_form_on_device, form
from mmerge.workers.runtime.host_memory import empty_host

TEXT = -1
"""The modality id of text tokens, generated ones included. Expert i of a composite has the id i."""
FORM_ENTRIES = 1 << 21
"""Entries of a modality's weight formed at once, at least: what was formed is multiplied while it
lies in a cache.
"""
FORM_ROWS = 1024
"""Rows formed at once, at least: products of fewer rows are slow, by half where a processor has
instructions for matrices.
"""
ROW_STEP = 64
"""Blocks are of whole multiples of so many rows: what is behind a multiple costs a product as much
as another.
"""

Policy = Literal["packed", "resident"]
"""`packed` keeps τ⋆ and bits, and forms a modality's weights per layer at prefill; `resident` keeps
every modality's weights.
"""


class Routing:
    """Which modality each position of the running forward pass has; shared by all layers of a
    model.

    Groups are found once per pass, not once per layer: on a GPU each search is a wait for the
    device.
    """

    def __init__(self) -> None:
        self._turn = RLock()
        self._modality_ids: torch.Tensor | None = None
        self._prompt_ids: torch.Tensor | None = None
        self._rooms: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.groups: tuple[Group, ...] | None = None
        """The tokens of each modality; None where all are text."""

    @property
    def modality_ids(self) -> torch.Tensor | None:
        """The modality of each token, int64 [batch, tokens]; None outside of a prefill."""
        return self._modality_ids

    @modality_ids.setter
    def modality_ids(self, modality_ids: torch.Tensor | None) -> None:
        self._modality_ids = modality_ids
        groups = () if modality_ids is None else make_groups(modality_ids)
        self.groups = groups if any(group.modality != TEXT for group in groups) else None
        if self.groups is None:
            self._rooms.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_turn"
        }  # a copy of a model has turns of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turn = RLock()

    def room_for(self, shape: tuple[int, int], *, like: torch.Tensor) -> torch.Tensor:
        """Return memory for a block of weights, of this shape, which the next block takes again:
        fresh memory has to be faulted in.

        It is kept until the prefill ends.
        """
        num_entries = shape[0] * shape[1]
        key = like.device, like.dtype
        room = self._rooms.get(key)
        if room is None or len(room) < num_entries:
            is_host = like.device.type == "cpu"
            room = (
                empty_host((num_entries,), like.dtype)
                if is_host
                else torch.empty(num_entries, dtype=like.dtype, device=like.device)
            )
            self._rooms[key] = room
        return room[:num_entries].view(shape)

    def check(self, inputs: torch.Tensor) -> None:
        """Raise ValueError when the routing is for other tokens than `inputs` [batch, tokens,
        width] has.
        """
        if self._modality_ids is not None and self._modality_ids.shape != inputs.shape[:-1]:
            raise ValueError(
                f"routing is for tokens {tuple(self._modality_ids.shape)}, the layer got"
                f" {tuple(inputs.shape[:-1])}"
            )

    @contextmanager
    def prefill(self, modality_ids: torch.Tensor) -> Iterator[None]:
        """Route the passes inside by the ids of a prompt, int64 [batch, tokens]; outside, every
        token is text.

        A model that this routing follows may take the prompt in pieces, and tokens behind it are
        text. One thread at a time is inside: others wait, since layers know one prompt only.
        """
        with self._turn:
            self._prompt_ids = self.modality_ids = modality_ids
            try:
                yield
            finally:
                self._prompt_ids = self.modality_ids = None

    def follow(self, model: nn.Module) -> None:
        """Set the modality of each token ahead of every forward pass of a language model, while
        `prefill` lasts.
        """
        # The hook holds the routing and not what holds the model: a model that is part of a cycle
        # keeps its memory when it is dropped.
        model.register_forward_pre_hook(self._route, with_kwargs=True)

    def _route(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before each forward pass: tokens of the prompt have its modalities, tokens behind it are
        generated text.

        The prompt may come in one pass or in pieces, and with beams or several answers each row of
        it several times.
        """
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        past = kwargs.get("past_key_values")
        start = 0 if past is None else int(past.get_seq_length())
        if self._prompt_ids is None or given is None or start >= self._prompt_ids.shape[1]:
            self.modality_ids = None
            return
        rows, tokens = given.shape[:2]
        ids = self._prompt_ids[:, start : start + tokens]
        ids = torch.nn.functional.pad(ids, (0, tokens - ids.shape[1]), value=TEXT)
        self.modality_ids = ids.repeat_interleave(rows // len(ids), dim=0)


class RoutedLinear(nn.Module):
    """A Linear whose weights are θ₀ + mᵢ∘τ⋆ for tokens of modality i and θ₀ + m̄∘τ⋆ for text (MMER,
    Expansion).

    The text weights are resident, so that decoding costs what a plain Linear costs. With the policy
    `packed` a modality's weights are θ_text + (mᵢ − m̄)∘τ⋆, formed block by block when a prefill
    has tokens of that modality; θ₀ itself is not kept. With `resident` they are kept, formed from
    θ₀. In bfloat16 the two differ by the rounding of θ_text. Tokens are gathered, so each is
    multiplied once.
    """

    def __init__(
        self, routing: Routing, weights: RoutedWeights, *, bias: RoutedBias | None = None
    ) -> None:
        """Make a layer over `weights`, on their device."""
        super().__init__()
        self._routing = routing
        self.num_experts = weights.num_experts
        self._factors, self._divisor = weights.factors, weights.divisor
        self.weight = nn.Parameter(weights.text, requires_grad=False)
        self.modalities: torch.Tensor | None
        self.register_buffer("delta", weights.delta, persistent=False)
        self.register_buffer("masks", weights.masks, persistent=False)
        self.register_buffer("modalities", weights.modalities, persistent=False)
        self.bias = bias

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    def modality_weight(
        self, index: int, *, rows: slice = slice(None), into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return some rows of the weights of expert `index`, [rows, in], in the layer's dtype;
        formed in `into` if they are not kept.
        """
        if self.num_experts == 1:
            return self.weight[rows]  # of a single expert m̄ is its mask
        if self.modalities is not None:
            return self.modalities[index, rows]
        text, delta, masks = (
            self.weight.detach()[rows],
            self.get_buffer("delta")[rows],
            self.get_buffer("masks")[:, rows],
        )
        return form_weight(
            text, delta, masks, factors=self._factors[index], divisor=self._divisor, out=into
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, out] for inputs [batch, tokens, in]."""
        groups = self._routing.groups
        if groups is None:
            return nn.functional.linear(
                inputs, self.weight, self.bias.text if self.bias is not None else None
            )
        self._routing.check(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs = flat.new_empty(flat.shape[0], self.out_features)
        taken = [(group, group.take(flat)) for group in groups]
        for group, tokens in taken:
            if group.modality == TEXT:
                group.multiply(
                    tokens, self.weight, self._bias_of(TEXT, slice(None)), outputs=outputs
                )
        # Blocks outside, modalities inside: all modalities read the same rows of θ_text and τ⋆, the
        # second time from a cache.
        step = (
            self.out_features
            if self.modalities is not None
            else block_rows(self.out_features, self.in_features)
        )
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            room = None
            if self.delta is not None and not is_tracked(
                inputs
            ):  # gradients need all weights once more
                room = self._routing.room_for(
                    (rows.stop - rows.start, self.in_features), like=self.weight
                )
            for group, tokens in taken:
                if group.modality != TEXT:
                    weight = self.modality_weight(group.modality, rows=rows, into=room)
                    group.multiply(
                        tokens,
                        weight,
                        self._bias_of(group.modality, rows),
                        outputs=outputs,
                        rows=rows,
                    )
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def _bias_of(self, modality: int, rows: slice) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.of(modality)[rows]


class RoutedBias(nn.Module):
    """A bias per modality, and the one of text tokens."""

    def __init__(self, text: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.text: torch.Tensor
        self.register_buffer("text", text, persistent=False)
        for index, bias in enumerate(experts):
            self.register_buffer(f"expert{index}", bias, persistent=False)

    def of(self, index: int) -> torch.Tensor:
        """Return the bias of a modality id."""
        return self.text if index == TEXT else self.get_buffer(f"expert{index}")


@dataclass(frozen=True)
class RoutedWeights:
    """What a RoutedLinear holds: θ_text, and either τ⋆ with the packed masks, or the weights of
    every modality.

    `text` is [out, in] in the layer's dtype, `delta` [out, in] in any, `masks` uint8 [experts, out,
    ⌈in/8⌉] packed by rows, `modalities` [experts, out, in]. θᵢ = θ_text + (Σ factorsᵢⱼ·mⱼ /
    divisor)∘τ⋆.
    """

    text: torch.Tensor
    delta: torch.Tensor | None
    masks: torch.Tensor | None
    modalities: torch.Tensor | None
    factors: list[list[float]]
    divisor: float

    @property
    def num_experts(self) -> int:
        """Experts with a mask."""
        return len(self.factors)

    @classmethod
    def make(
        cls,
        base: torch.Tensor,
        delta: torch.Tensor,
        masks: torch.Tensor,
        *,
        dtype: torch.dtype,
        policy: Policy = "packed",
        rescalers: Sequence[float] = (),
    ) -> RoutedWeights:
        """Return what a layer holds, from θ₀ and τ⋆ [out, in], masks packed by rows, and the
        factors on the masks (EMR) if any.
        """
        count = len(masks)
        scales = list(rescalers) or [1.0] * count
        text = form_weight(base, delta, masks, factors=scales, divisor=float(count), dtype=dtype)
        factors, divisor = cls.factors_of(scales)
        if policy == "packed":
            is_needed = count > 1
            return cls(
                text,
                delta if is_needed else None,
                masks if is_needed else None,
                None,
                factors,
                divisor,
            )
        own = [[scales[j] if i == j else 0.0 for j in range(count)] for i in range(count)]
        modalities = torch.stack(
            [
                form_weight(base, delta, masks, factors=each, divisor=1.0, dtype=dtype)
                for each in own
            ]
        )
        return cls(text, None, None, modalities, factors, divisor)

    @staticmethod
    def factors_of(rescalers: Sequence[float]) -> tuple[list[list[float]], float]:
        """Return the factors of each expert on all masks, and their divisor: mᵢ − m̄ = (n·mᵢ − Σ
        mⱼ) / n, with rⱼ on each mⱼ.
        """
        count = len(rescalers)
        return [
            [rescalers[j] * ((count if i == j else 0) - 1) for j in range(count)]
            for i in range(count)
        ], float(count)


def block_rows(num_rows: int, width: int) -> int:
    """Return how many rows of a modality's weight [num_rows, width] are formed at once.

    All blocks have about one size: a small one takes as long as a large one.
    """
    most = max(FORM_ROWS, FORM_ENTRIES // width)
    even = -(-num_rows // -(-num_rows // most))
    return min(num_rows, -(-even // ROW_STEP) * ROW_STEP)


def form_weight(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return base + (Σ factorsⱼ·mⱼ / divisor)∘τ⋆, [rows, width], in `dtype` (the base's if absent),
    or in `out`.

    Computed in float32 and rounded once; masks packed by rows, uint8 [experts, rows, ⌈width/8⌉].
    """
    if out is None:
        out = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    if can_form(base, delta, out):
        form(base, delta, masks, factors=factors, divisor=divisor, out=out)
        return out
    if can_form_on_device(base, delta, out):
        from mmerge.workers.kernels.masked_weights_triton import form_on_device

        form_on_device(base, delta, masks, factors=factors, divisor=divisor, out=out)
        return out
    return form_by_torch(base, delta, masks, factors=factors, divisor=divisor, out=out)


def form_by_torch(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write what `form_weight` returns to `out` and return it, on any device: the reference that
    the kernels are compared with.
    """
    share = torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
    for mask, factor in zip(masks, factors, strict=True):
        share += factor * unpack_rows(mask, delta.shape[1]).to(torch.float32)
    return out.copy_(base.to(torch.float32) + share / divisor * delta.to(torch.float32))
