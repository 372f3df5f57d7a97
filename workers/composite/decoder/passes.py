"""Forward passes of the base's decoder with what experts' classes hand to theirs.

The base's own class computes every pass. Hooks give it what its arguments have no place for, while
a prompt needs it: rotary positions of three dimensions, a mask in which tokens of a block see each
other, embeddings added behind single layers. A prompt without any of it runs without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.composite.decoder.prompt_inputs import PromptInputs
from mmerge.workers.modalities.decoder_inputs import find_decoder
from mmerge.workers.modalities.rotary_axes import find_layout, to_layout

_SLIDING = {"full_attention", "sliding_attention"}


@contextmanager
def decoder_inputs(model: Any, batch: PromptInputs, mask: torch.Tensor) -> Iterator[None]:
    """Run the passes inside the context with the inputs of a batch of prompts.

    The prompts may come in one pass or in chunks; tokens behind them are text. With beams or
    several answers per prompt each row is repeated.

    Args:
        model: the language model, a class of transformers.
        batch: the prompts, padded on the left.
        mask: int64 [batch, tokens], 1 where a token belongs to its prompt.

    Raises:
        CheckpointError: the class of the language model has no place for them.
    """
    passes = _Passes(find_decoder(model), batch, mask)
    try:
        passes.register()
        yield
    finally:
        passes.remove()


class _Passes:
    """Hooks of one prefill and the decoding behind it."""

    def __init__(self, decoder: Any, batch: PromptInputs, mask: torch.Tensor) -> None:
        self.decoder, self.batch, self.mask = decoder, batch, mask
        self.num_padding = (mask == 0).sum(-1)
        self.start = 0
        """Tokens that the cache holds already, padding included."""
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Register the hooks that this batch needs."""
        batch, decoder = self.batch, self.decoder
        if batch.blocks is not None or batch.layer_embeds:
            self._add(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        if self._moves_positions():
            rotary = getattr(decoder, "rotary_emb", None)
            if not isinstance(rotary, nn.Module):
                raise _refuse(decoder, "has no rotary embedding of its own")
            self._add(rotary.register_forward_hook(self._rotate, with_kwargs=True))
        if len(batch.layer_embeds) > len(decoder.layers):
            raise _refuse(decoder, f"has fewer than {len(batch.layer_embeds)} layers")
        for index in range(len(batch.layer_embeds)):
            self._add(decoder.layers[index].register_forward_hook(self._adder(index)))

    def remove(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()

    def _add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _moves_positions(self) -> bool:
        count = self.batch.positions.shape[-1]
        consecutive = torch.arange(count) - self.num_padding.cpu()[:, None]
        is_prompt = self.mask.cpu() == 1
        return bool((self.batch.positions - consecutive)[:, is_prompt].any())

    def _repeat(self, values: torch.Tensor, num_rows: int, *, dim: int = 0) -> torch.Tensor:
        """Return one row per sequence of a pass: beams repeat their prompt's."""
        return values.repeat_interleave(num_rows // values.shape[dim], dim=dim)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note where a pass begins; let tokens of a block see each other."""
        cache = kwargs.get("past_key_values")
        self.start = 0 if cache is None else int(cache.get_seq_length())
        if self.batch.blocks is None or self.start >= self.mask.shape[1]:
            return None
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise _refuse(module, "was called without inputs_embeds")
        return args, kwargs | {"attention_mask": self._make_masks(inputs, cache)}

    def _make_masks(self, inputs: torch.Tensor, cache: Any) -> Any:
        """Return the mask of a pass, or one per kind of layer, as transformers makes them."""
        assert self.batch.blocks is not None
        num_rows, num_tokens = inputs.shape[:2]
        device = inputs.device
        blocks = self._repeat(self.batch.blocks, num_rows).to(device)
        mask = self._repeat(self.mask, num_rows)[:, : self.start + num_tokens].to(device)
        config = self.decoder.config
        kinds = set(getattr(config, "layer_types", None) or ())
        arguments = {
            "config": config,
            "inputs_embeds": inputs,
            "attention_mask": mask,
            "past_key_values": cache,
            "position_ids": None,
            "block_sequence_ids": blocks,
        }
        masks: Any
        if self.batch.is_prefix or "sliding_attention" not in kinds:
            masks = create_masks_for_generate(**arguments)
        elif kinds <= _SLIDING:
            # Within an image a window still cuts what lies too far back (Gemma 3).
            masks = create_masks_for_vision_model(**arguments)
        else:
            raise _refuse(self.decoder, f"has layers of {', '.join(sorted(kinds))}")
        if masks is mask:
            raise _refuse(self.decoder, f"has layers of {', '.join(sorted(kinds))}")
        return masks

    def _rotate(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return cosines and sines of the tokens' own positions, [batch, tokens, angles] each."""
        inputs, tokens, others = _to_rotary_arguments(args, kwargs)
        rotate = module.forward  # without the hooks of the module, this one among them
        device = tokens.device
        num_rows = self.batch.positions.shape[1]
        num_rows = max(num_rows, len(tokens))
        tokens = tokens.expand(num_rows, -1)
        num_padding = self._repeat(self.num_padding, num_rows).to(device)[:, None]
        length = self.mask.shape[1]
        columns = tokens + num_padding
        is_behind = columns >= length
        columns = columns.clamp(max=length - 1)
        next_positions = self._repeat(self.batch.next_positions, num_rows).to(device)[:, None]
        behind = next_positions + tokens - (length - num_padding)
        if is_behind.all():
            return rotate(inputs, behind, **others)
        table = self._repeat(self.batch.positions, num_rows, dim=1).to(device)
        rotated = []
        for dimension in range(3):
            positions = torch.where(is_behind, behind, table[dimension].gather(1, columns))
            rotated.append(rotate(inputs, positions, **others))
        if self.batch.axes is None:
            return rotated[0]
        cosines, sines = (torch.stack(values) for values in zip(*rotated, strict=True))
        axes = self._repeat(self.batch.axes, num_rows).to(device)
        index = columns[..., None].expand(-1, -1, axes.shape[-1])
        layout = find_layout(sines.reshape(-1, sines.shape[-1])[-1])
        chosen = to_layout(axes.gather(1, index), layout)
        if chosen.shape[-1] != sines.shape[-1]:
            raise _refuse(
                self.decoder, f"rotates {sines.shape[-1]} angles, an expert {chosen.shape[-1]}"
            )
        return tuple(values.gather(0, chosen[None])[0] for values in (cosines, sines))

    def _adder(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        """Return a hook that adds embeddings to the hidden states behind a layer."""

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            num_rows, num_tokens = hidden.shape[:2]
            added = self.batch.layer_embeds[index][:, self.start : self.start + num_tokens]
            if not added.shape[1]:
                return None
            added = nn.functional.pad(added, (0, 0, 0, num_tokens - added.shape[1]))
            hidden = hidden + self._repeat(added, num_rows).to(hidden.device, hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add


def _to_rotary_arguments(
    args: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return hidden states, the index of each token, int64 [batch, tokens], and other arguments."""
    others = dict(kwargs)
    positional = list(args)
    inputs = positional.pop(0) if positional else others.pop("x")
    tokens = positional.pop(0) if positional else others.pop("position_ids")
    if positional:
        others["layer_type"] = positional.pop(0)
    # Decoders that know three dimensions themselves repeat the index of each token.
    return inputs, tokens[0] if tokens.ndim == 3 else tokens, others


def _refuse(decoder: nn.Module, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the language model of the composite ({type(decoder).__name__}) {reason}: it cannot take"
        " what the expert's class hands its decoder. Use that expert as its own class, from"
        " 'mmerge export --expert'"
    )
