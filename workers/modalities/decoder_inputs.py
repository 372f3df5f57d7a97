"""What an expert's class hands its decoder for one input, read from the call of the decoder.

Besides embeddings a class may hand over rotary positions of three dimensions (M-RoPE), a mask in
which tokens see later ones, and embeddings that are added behind single layers (deepstack). They
are read from one call, so no table of classes is needed; what is not understood is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.modalities.rotary_axes import find_axes

CAUSAL = -1
"""Block id of tokens that see no later ones."""
_READ = (
    *("inputs_embeds", "position_ids", "attention_mask"),
    *("visual_pos_masks", "deepstack_visual_embeds"),
)
_HARMLESS = {
    *("use_cache", "past_key_values", "cache_position"),
    *("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"),
}
"""Arguments that change what is returned or kept, not what is computed."""


@dataclass(frozen=True)
class DecoderInputs:
    """What enters the decoder for the tokens of one input."""

    embeds: torch.Tensor
    """[tokens, hidden]."""
    positions: torch.Tensor
    """Rotary positions, int64 [3, tokens] on the CPU; the text before the input ends at -1."""
    advance: int
    """Rotary position of the text behind the input."""
    axes: tuple[int, ...] | None = None
    """Dimension of the positions that each rotary frequency follows; None where all are equal."""
    blocks: torch.Tensor | None = None
    """Block of each token, int64 [tokens] on the CPU: tokens see all others of their block.

    None where every token sees earlier ones alone, as in blocks `CAUSAL`.
    """
    is_prefix: bool = False
    """Whether all tokens of the prompt see each other."""
    layer_embeds: tuple[torch.Tensor, ...] = ()
    """Added to the hidden states behind the first layers, [tokens, hidden] each."""

    @classmethod
    def from_embeds(cls, embeds: torch.Tensor) -> DecoderInputs:
        """Return inputs with consecutive positions and causal attention."""
        count = len(embeds)
        return cls(embeds, torch.arange(count).expand(3, -1), count)

    def to(self, device: torch.device) -> DecoderInputs:
        """Return the same with its embeddings on a device."""
        layers = tuple(values.to(device) for values in self.layer_embeds)
        return replace(self, embeds=self.embeds.to(device), layer_embeds=layers)


class DecoderCall:
    """One call of an expert's decoder, for a batch of one prompt."""

    def __init__(self, decoder: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Take the arguments of a call, by name."""
        self.decoder = decoder
        self._values: dict[str, Any] = dict(kwargs)
        if args:
            names = list(inspect.signature(decoder.forward).parameters)
            self._values |= dict(zip(names, args, strict=False))

    @property
    def embeds(self) -> torch.Tensor | None:
        """The embeddings of all tokens, [tokens, hidden]."""
        embeds = self._values.get("inputs_embeds")
        return None if embeds is None else embeds[0]

    def read(self, first: int, end: int, *, owner: str) -> DecoderInputs:
        """Return what enters the decoder for the tokens from `first` up to `end`.

        The tokens before and behind them must be text.

        Raises:
            CheckpointError: an argument is not understood; `owner` and the class are named.
        """
        self._check_known(owner=owner)
        embeds = self.embeds
        if embeds is None:
            raise CheckpointError(
                f"{owner}: its model does not pass embeddings to its language model as"
                " inputs_embeds"
            )
        positions, advance = self._read_positions(first, end, len(embeds), owner=owner)
        has_axes = not bool((positions == positions[0]).all())
        blocks = self._read_blocks(len(embeds), owner=owner)
        is_prefix = self.is_prefix(len(embeds), owner=owner)
        outside = torch.cat([blocks[:first], blocks[end:]])
        if not is_prefix and bool((outside != CAUSAL).any()):
            raise self._refuse("attention_mask lets text beside the input see later tokens", owner)
        inside = blocks[first:end]
        has_blocks = not is_prefix and bool((inside != CAUSAL).any())
        return DecoderInputs(
            embeds=embeds[first:end],
            positions=positions,
            advance=advance,
            axes=find_axes(self.decoder, owner=owner) if has_axes else None,
            blocks=inside if has_blocks else None,
            is_prefix=is_prefix,
            layer_embeds=self._read_layer_embeds(first, end, len(embeds), owner=owner),
        )

    def is_prefix(self, num_tokens: int, *, owner: str) -> bool:
        """Return whether all `num_tokens` tokens see each other.

        Raises:
            CheckpointError: the mask is not understood.
        """
        blocks = self._read_blocks(num_tokens, owner=owner)
        return bool((blocks == blocks[0]).all()) and int(blocks[0]) != CAUSAL

    def _refuse(self, reason: str, owner: str) -> CheckpointError:
        name = type(self.decoder).__name__
        return CheckpointError(
            f"{owner}: its class hands its decoder ({name}) what a composite does not carry over:"
            f" {reason}. Use that expert as its own class, from 'mmerge export --expert'"
        )

    def _check_known(self, *, owner: str) -> None:
        for name, value in self._values.items():
            if name in _READ or name in _HARMLESS or value is None or value is False:
                continue
            raise self._refuse(f"{name} ({_describe(value)})", owner)

    def _read_positions(
        self, first: int, end: int, num_tokens: int, *, owner: str
    ) -> tuple[torch.Tensor, int]:
        """Return positions relative to the text before, [3, tokens], and the one behind."""
        value = self._values.get("position_ids")
        if value is None:
            count = end - first
            return torch.arange(count).expand(3, -1), count
        positions = value.cpu()
        if positions.ndim == 3:
            positions = positions[-3:]  # a fourth row, the first, counts tokens for the mask
        positions = positions[..., 0, :] if positions.ndim == 3 else positions[:1].expand(3, -1)
        if positions.shape != (3, num_tokens):
            raise self._refuse(f"position_ids ({_describe(value)})", owner)
        before, behind = positions[:, first - 1], positions[:, end]
        is_text = (before == before[0]).all() and (behind == behind[0]).all()
        if not is_text:
            raise self._refuse("position_ids of three dimensions for text", owner)
        start = before[0] + 1
        return positions[:, first:end] - start, int(behind[0] - start)

    def _read_blocks(self, num_tokens: int, *, owner: str) -> torch.Tensor:
        """Return the block of each token, int64 [tokens]."""
        value = self._values.get("attention_mask")
        candidates = list(value.values()) if isinstance(value, Mapping) else [value]
        # A mask of two dimensions marks padding alone.
        masks: list[torch.Tensor] = [
            mask for mask in candidates if mask is not None and mask.ndim > 2
        ]
        # Without a mask, a class that says so lets every token see all others.
        config = getattr(self.decoder, "config", None)
        is_open = value is None and bool(getattr(config, "use_bidirectional_attention", False))
        blocks = torch.full((num_tokens,), 0 if is_open else CAUSAL)
        for index, mask in enumerate(masks):
            found = _to_blocks(mask, num_tokens)
            if found is None or (index and not torch.equal(found, blocks)):
                raise self._refuse(f"attention_mask ({_describe(mask)})", owner)
            blocks = found
        return blocks

    def _read_layer_embeds(
        self, first: int, end: int, num_tokens: int, *, owner: str
    ) -> tuple[torch.Tensor, ...]:
        embeds = self._values.get("deepstack_visual_embeds")
        places = self._values.get("visual_pos_masks")
        if embeds is None:
            return ()
        if places is None or places.shape != (1, num_tokens):
            raise self._refuse("deepstack_visual_embeds without visual_pos_masks", owner)
        layers = []
        for values in embeds:
            spread = values.new_zeros(num_tokens, values.shape[-1])
            spread[places[0].to(values.device)] = values
            layers.append(spread[first:end])
        return tuple(layers)


def find_decoder(model: Any) -> nn.Module:
    """Return the module of a model that holds its layers."""
    decoder: nn.Module = model.get_decoder()
    # Llama 4 calls its causal language model the decoder.
    return decoder if hasattr(decoder, "layers") else decoder.get_submodule("model")


@contextmanager
def capture_calls(model: Any) -> Iterator[list[DecoderCall]]:
    """Yield a list to which each call of a model's decoder inside the context is added."""
    calls: list[DecoderCall] = []

    def capture(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(DecoderCall(module, args, kwargs))

    handle = find_decoder(model).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _describe(value: Any) -> str:
    shape = f" {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{type(value).__name__}{shape}"


def _to_blocks(mask: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    """Return the blocks, int64 [tokens], of a mask [1, heads, tokens, tokens]; None for others.

    Of a mask of floats 0 is open; a mask of bools is open where true.
    """
    if mask.ndim != 4 or mask.shape[0] != 1 or mask.shape[-2:] != (num_tokens, num_tokens):
        return None
    is_open = (mask if mask.dtype == torch.bool else mask == 0).cpu()
    if not (is_open == is_open[:, :1]).all():
        return None
    later = is_open[0, 0].triu(1)
    linked = later.diagonal(1)
    ids = torch.cat([torch.zeros(1, dtype=torch.long), (~linked).cumsum(0)])
    if not torch.equal(later, (ids[:, None] == ids).triu(1)):
        return None
    is_single = torch.bincount(ids)[ids] == 1
    return ids.masked_fill(is_single, CAUSAL)
