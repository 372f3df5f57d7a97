"""Encoders of a composite: an expert's own, one that a user registered, or one that another rank
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.modalities.processor_encoder import MediaEncoder, make_config
from mmerge.workers.modalities.projector import FeatureEncoder
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight


class Encoder(Protocol):
    """Turns a medium into embeddings for the language model."""

    modality: str

    def encode(self, part: Part) -> torch.Tensor:
        """Return the embeddings of one medium, [tokens, hidden]. Raises PromptError when it cannot
        be read.
        """


@dataclass(frozen=True)
class EncoderRequest:
    """All that a registered encoder is made from."""

    expert: str
    modality: str
    files: Mapping[str, bytes]
    """The expert's configuration and processor files, by name."""
    state: Mapping[str, torch.Tensor]
    """The carried tensors: encoder, connector and whatever else of the expert is not the base's,
    named as in its files.
    """
    hidden_size: int
    """Width of the embeddings to return."""
    dtype: torch.dtype
    device: torch.device


EncoderMaker = Callable[[EncoderRequest], Encoder]
_makers: dict[str, EncoderMaker] = {}


def register_encoder(modality: str, maker: EncoderMaker) -> None:
    """Let experts of a modality encode with what `maker` returns, in composites loaded from now on.

    `maker` gets the expert's carried tensors and files and returns an object with `modality` and
    `encode(part)`, which gives embeddings [tokens, hidden_size]. Part.value is whatever the prompt
    gives: a path, an array, an object of your own.
    """
    _makers[modality] = maker


def load_encoder(
    reader: BuildReader,
    expert: str,
    *,
    files: Mapping[str, bytes],
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Encoder:
    """Return the encoder of an expert: the registered one of its modality, else its own, else its
    connector of features.
    """
    record = reader.manifest.to_expert(expert)
    state = {key: reader.read(key, "carried", expert) for key in reader.encoder_names(expert)}
    if (maker := _makers.get(record.modality)) is not None:
        request = EncoderRequest(expert, record.modality, files, state, hidden_size, dtype, device)
        return _Checked(maker(request), request)
    config = make_config(files, owner=f"expert {expert!r}") if "config.json" in files else None
    if config is None or config.get_text_config() is config:
        return FeatureEncoder(
            expert=expert,
            modality=record.modality,
            state=state,
            hidden_size=hidden_size,
            dtype=dtype,
            device=device,
        )
    embedding = reader.family.find_embedding(reader.llm_names())
    assert embedding is not None  # a family is chosen by it
    return MediaEncoder(
        expert=expert,
        modality=record.modality,
        files=files,
        state=state,
        embedding=(
            reader.manifest.rename(embedding, expert=expert),
            rebuild_weight(reader, embedding, expert=expert),
        ),
        placeholder=record.placeholder,
        dtype=dtype,
        device=device,
    )


class _Checked:
    """A registered encoder whose embeddings are checked: a wrong shape is named here, not deep in
    the language model.
    """

    def __init__(self, inner: Encoder, request: EncoderRequest) -> None:
        self.modality, self._inner, self._request = request.modality, inner, request
        if not callable(getattr(inner, "encode", None)):
            raise CheckpointError(
                f"expert {request.expert!r}: the encoder registered for {request.modality!r} has no"
                " method 'encode'"
            )

    def encode(self, part: Part) -> torch.Tensor:
        """See Encoder."""
        with torch.inference_mode():
            embeds = self._inner.encode(part)
        wanted = self._request
        if (
            not isinstance(embeds, torch.Tensor)
            or embeds.ndim != 2
            or embeds.shape[1] != wanted.hidden_size
        ):
            shape = (
                tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
            )
            raise PromptError(
                f"{part.kind}: the encoder registered for {wanted.modality!r} returned {shape},"
                f" expected embeddings [tokens, {wanted.hidden_size}]"
            )
        return embeds.to(wanted.device, wanted.dtype)
