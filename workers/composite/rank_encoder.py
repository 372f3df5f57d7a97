"""An encoder that lives on one rank and serves all ranks of a composite."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.modalities.decoder_inputs import DecoderInputs
from mmerge.workers.modalities.encoders import Encoder, encode_for_decoder
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.text_rules import TextRules


class RankEncoder:
    """Encodes on one rank and broadcasts the embeddings, and the errors, to the others."""

    def __init__(
        self,
        encoder: Encoder | None,
        *,
        modality: str,
        group: ProcessGroup,
        source: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the encoder of this rank; `encoder` is None on every rank but `source`."""
        self.modality = modality
        self._encoder, self._group, self._source = encoder, group, source
        self._dtype, self._device = dtype, device
        self.placeholders: tuple[str, ...] = group.broadcast_object(
            getattr(encoder, "placeholders", ()), source=source
        )
        """See `MediaEncoder`; every rank forms the same prompts."""
        rules = getattr(encoder, "text_rules", None)
        self.text_rules: TextRules | None = group.broadcast_object(rules, source=source)

    def encode(self, part: Part) -> torch.Tensor:
        """See Encoder."""
        return self.encode_for_decoder(part).embeds

    def encode_for_decoder(self, part: Part) -> DecoderInputs:
        """See Encoder. Every rank calls this with the same part and raises the same error."""
        inputs: DecoderInputs | None = None
        error: PromptError | CheckpointError | None = None
        if self._encoder is not None:
            try:
                inputs = encode_for_decoder(self._encoder, part)
            except (PromptError, CheckpointError) as failure:
                error = type(failure)(Exception.__str__(failure))
        embeds = () if inputs is None else (inputs.embeds, *inputs.layer_embeds)
        moved = [values.to(self._device, self._dtype) for values in embeds]
        shapes = [tuple(values.shape) for values in moved]
        # Positions and blocks are small and on the CPU; the embeddings follow as tensors.
        small = inputs and replace(inputs, embeds=torch.empty(0), layer_embeds=())
        error, small, shapes = self._group.broadcast_object(
            (error, small, shapes), source=self._source
        )
        if error is not None:
            raise error
        assert isinstance(small, DecoderInputs)
        if not moved:
            moved = [torch.empty(shape, dtype=self._dtype, device=self._device) for shape in shapes]
        first, *layers = [self._group.broadcast(values, source=self._source) for values in moved]
        return replace(small, embeds=first, layer_embeds=tuple(layers))
