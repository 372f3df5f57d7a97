"""An encoder that lives on one rank and serves all ranks of a composite."""

from __future__ import annotations

import torch

from mmerge.manifests.errors import PromptError
from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.modalities.encoders import Encoder
from mmerge.workers.modalities.prompt import Part


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

    def encode(self, part: Part) -> torch.Tensor:
        """See Encoder. Every rank calls this with the same part and raises the same PromptError."""
        embeds: torch.Tensor | None = None
        outcome: tuple[str, tuple[int, ...]] = ("", ())
        if self._encoder is not None:
            try:
                embeds = self._encoder.encode(part).to(self._device, self._dtype)
                outcome = ("", tuple(embeds.shape))
            except PromptError as error:
                outcome = (Exception.__str__(error), ())
        message, shape = self._group.broadcast_object(outcome, source=self._source)
        if message:
            raise PromptError(message)
        if embeds is None:
            embeds = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._group.broadcast(embeds, source=self._source)
