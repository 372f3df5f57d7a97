"""Prompts composed of text and inputs of several experts, as the base's decoder takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mmerge.manifests.errors import PromptError
from mmerge.workers.composite.routing import TEXT
from mmerge.workers.modalities.decoder_inputs import CAUSAL, DecoderInputs


@dataclass(frozen=True)
class Piece:
    """Text, or one input of an expert."""

    inputs: DecoderInputs
    modality: int
    """Index of the expert; `TEXT` for text and inputs of a multimodal base."""
    name: str
    """Whose input it is, for errors; empty for text."""


@dataclass(frozen=True)
class PromptInputs:
    """One prompt, or a batch of prompts of one length, padded on the left.

    Shapes are those of a batch; a prompt alone has no batch dimension.
    """

    embeds: torch.Tensor
    """[batch, tokens, hidden]."""
    ids: torch.Tensor
    """Modality of each token, int64 [batch, tokens]."""
    positions: torch.Tensor
    """Rotary positions, int64 [3, batch, tokens]."""
    next_positions: torch.Tensor
    """Rotary position of the token behind each prompt, int64 [batch]."""
    axes: torch.Tensor | None
    """Dimension of the positions for each rotary frequency, int64 [batch, tokens, frequencies].

    None where the three dimensions are equal everywhere.
    """
    blocks: torch.Tensor | None
    """Tokens of one block see each other, int64 [batch, tokens]; None where all are causal."""
    is_prefix: bool
    """Whether blocks are prefixes, which a sliding window does not cut."""
    layer_embeds: tuple[torch.Tensor, ...]
    """Added to the hidden states behind the first layers, [batch, tokens, hidden] each."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Unpack to embeddings and modality ids."""
        return iter((self.embeds, self.ids))

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return embeddings (0) or modality ids (1)."""
        return (self.embeds, self.ids)[index]


def compose(
    pieces: Sequence[Piece], *, num_answer: int = 0, text_is_prefix: bool = False
) -> PromptInputs:
    """Return the prompt of these pieces, one behind the other.

    Each input keeps the rotary positions that its class gives it, relative to the text before; text
    behind continues where the class continues it. A frequency of a token follows the dimension that
    the token's own class says; those of text are equal. Blocks of tokens that see each other stay
    within their input; a prefix covers the whole prompt but the answer.

    Args:
        pieces: of the prompt, at least one.
        num_answer: tokens at the end that are an answer to it.
        text_is_prefix: whether text alone is a prefix.

    Raises:
        PromptError: an expert that sees the prompt as a prefix meets one that does not.
    """
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.inputs.advance)
    is_prefix = _is_prefix(pieces, of_text=text_is_prefix)
    blocks = _join_blocks(pieces)
    if is_prefix:
        blocks = torch.zeros_like(blocks)
        blocks[len(blocks) - num_answer :] = CAUSAL
    device = pieces[0].inputs.embeds.device
    lengths = [len(piece.inputs.embeds) for piece in pieces]
    ids = [
        torch.full((length,), piece.modality) for length, piece in zip(lengths, pieces, strict=True)
    ]
    positions = [
        piece.inputs.positions + start for piece, start in zip(pieces, starts[:-1], strict=True)
    ]
    return PromptInputs(
        embeds=torch.cat([piece.inputs.embeds for piece in pieces]),
        ids=torch.cat(ids).to(device),
        positions=torch.cat(positions, dim=-1),
        next_positions=torch.tensor(starts[-1]),
        axes=_join_axes(pieces),
        blocks=blocks if (blocks != CAUSAL).any() else None,
        is_prefix=is_prefix,
        layer_embeds=_join_layers(pieces),
    )


def _is_prefix(pieces: Sequence[Piece], *, of_text: bool) -> bool:
    inputs = [piece for piece in pieces if piece.name]
    prefixes = [piece.name for piece in inputs if piece.inputs.is_prefix]
    causal = [piece.name for piece in inputs if not piece.inputs.is_prefix]
    if prefixes and causal:
        raise PromptError(
            f"the class of expert {prefixes[0]!r} lets all tokens of a prompt see each other, the"
            f" class of expert {causal[0]!r} does not: their inputs cannot be put into one prompt."
            " Ask about them one by one"
        )
    return bool(prefixes) if inputs else of_text


def _join_blocks(pieces: Sequence[Piece]) -> torch.Tensor:
    """Return the block of each token, numbered through the prompt, int64 [tokens]."""
    joined, count = [], 0
    for piece in pieces:
        blocks = piece.inputs.blocks
        if blocks is None:
            joined.append(torch.full((len(piece.inputs.embeds),), CAUSAL))
            continue
        joined.append(torch.where(blocks == CAUSAL, CAUSAL, blocks + count))
        count += int(blocks.max()) + 1
    return torch.cat(joined)


def _join_axes(pieces: Sequence[Piece]) -> torch.Tensor | None:
    """Return the dimension for each token and frequency, int64 [tokens, frequencies]."""
    counts = {len(piece.inputs.axes) for piece in pieces if piece.inputs.axes is not None}
    if not counts:
        return None
    if len(counts) > 1:
        raise PromptError(
            f"inputs of the prompt rotate {sorted(counts)} frequencies of a head: experts of"
            " different language models cannot be put into one prompt"
        )
    width = counts.pop()
    rows = []
    for piece in pieces:
        row = torch.tensor(piece.inputs.axes or [0] * width)
        rows.append(row.expand(len(piece.inputs.embeds), -1))
    return torch.cat(rows)


def _join_layers(pieces: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
    """Return what is added behind each of the first layers, zero for tokens that add nothing."""
    count = max(len(piece.inputs.layer_embeds) for piece in pieces)
    layers = []
    for index in range(count):
        parts = []
        for piece in pieces:
            added = piece.inputs.layer_embeds
            parts.append(
                added[index] if index < len(added) else torch.zeros_like(piece.inputs.embeds)
            )
        layers.append(torch.cat(parts))
    return tuple(layers)


def to_batch(prompts: Sequence[PromptInputs]) -> tuple[PromptInputs, torch.Tensor]:
    """Return prompts as a batch padded on the left, and its mask, int64 [batch, tokens]."""
    length = max(len(prompt.ids) for prompt in prompts)
    device = prompts[0].ids.device
    mask = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        mask[row, length - len(prompt.ids) :] = 1
    num_layers = max(len(prompt.layer_embeds) for prompt in prompts)
    widths = {prompt.axes.shape[-1] for prompt in prompts if prompt.axes is not None}
    padded = [
        _pad(prompt, length, num_layers=num_layers, width=max(widths, default=0))
        for prompt in prompts
    ]
    has_blocks = any(prompt.blocks is not None for prompt in prompts)
    batch = PromptInputs(
        embeds=torch.stack([prompt.embeds for prompt in padded]),
        ids=torch.stack([prompt.ids for prompt in padded]),
        positions=torch.stack([prompt.positions for prompt in padded], dim=1),
        next_positions=torch.stack([prompt.next_positions for prompt in padded]),
        axes=torch.stack([_axes_of(prompt) for prompt in padded]) if widths else None,
        blocks=torch.stack([_blocks_of(prompt) for prompt in padded]) if has_blocks else None,
        is_prefix=any(prompt.is_prefix for prompt in prompts),
        layer_embeds=tuple(
            torch.stack([prompt.layer_embeds[index] for prompt in padded])
            for index in range(num_layers)
        ),
    )
    return batch, mask


def _pad(prompt: PromptInputs, length: int, *, num_layers: int, width: int) -> PromptInputs:
    """Return a prompt of `length` tokens: causal text in front, which the mask hides."""
    count = length - len(prompt.ids)
    pad = torch.nn.functional.pad
    axes, blocks = prompt.axes, prompt.blocks
    if axes is None and width:
        axes = torch.zeros(len(prompt.ids), width, dtype=torch.long)
    if blocks is None:
        blocks = torch.full((len(prompt.ids),), CAUSAL)
    empty = torch.zeros_like(prompt.embeds)
    layers = [*prompt.layer_embeds, *[empty] * (num_layers - len(prompt.layer_embeds))]
    return replace(
        prompt,
        embeds=pad(prompt.embeds, (0, 0, count, 0)),
        ids=pad(prompt.ids, (count, 0), value=TEXT),
        positions=pad(prompt.positions, (count, 0)),
        axes=None if axes is None else pad(axes, (0, 0, count, 0)),
        blocks=pad(blocks, (count, 0), value=CAUSAL),
        layer_embeds=tuple(pad(layer, (0, 0, count, 0)) for layer in layers),
    )


def _axes_of(prompt: PromptInputs) -> torch.Tensor:
    assert prompt.axes is not None  # padded prompts of a batch with axes
    return prompt.axes


def _blocks_of(prompt: PromptInputs) -> torch.Tensor:
    assert prompt.blocks is not None  # padded prompts
    return prompt.blocks
