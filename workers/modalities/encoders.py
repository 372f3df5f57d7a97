"""Encoders of a composite: the expert's own, or one that a user registered for a modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.modalities.decoder_inputs import DecoderInputs
from mmerge.workers.modalities.expert_model import make_config
from mmerge.workers.modalities.processor_encoder import MediaEncoder
from mmerge.workers.modalities.projector import FeatureEncoder
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.reconstruction.language_reader import LanguageReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight


class Encoder(Protocol):
    """Turns one input of a modality into embeddings for the language model.

    An encoder whose class hands its decoder more than embeddings has a method `encode_for_decoder`
    besides, which returns all of it for a part.
    """

    modality: str

    def encode(self, part: Part) -> torch.Tensor:
        """Return the embeddings of one input, [tokens, hidden].

        Raises:
            PromptError: it cannot be read.
        """


def encode_for_decoder(encoder: Encoder, part: Part) -> DecoderInputs:
    """Return what enters the decoder for one input.

    Raises:
        PromptError: it cannot be read.
    """
    encode = getattr(encoder, "encode_for_decoder", None)
    if encode is None:
        return DecoderInputs.from_embeds(encoder.encode(part))
    inputs: DecoderInputs = encode(part)
    return inputs


@dataclass(frozen=True)
class EncoderRequest:
    """What a registered encoder is made from."""

    expert: str
    modality: str
    files: Mapping[str, bytes]
    """The expert's configuration and processor files, by name."""
    state: Mapping[str, torch.Tensor]
    """The copied tensors: encoder, connector and others outside the base, named as in its files."""
    hidden_size: int
    """Width of the embeddings to return."""
    dtype: torch.dtype
    device: torch.device


_BASE_MODALITIES = {"vision_config": "image", "audio_config": "audio"}
"""By key of a config.json, the modality of the encoder that it describes."""
EncoderMaker = Callable[[EncoderRequest], Encoder]
_makers: dict[str, EncoderMaker] = {}


def register_encoder(modality: str, maker: EncoderMaker) -> None:
    """Use the encoder that `maker` returns for a modality, in composites loaded from now on.

    `maker` receives the expert's copied tensors and files and returns an object with `modality` and
    `encode(part)`, which returns embeddings [tokens, hidden_size]. `part.value` is passed through
    from the prompt: a path, an array or any other object.
    """
    _makers[modality] = maker


def has_registered_encoder(modality: str) -> bool:
    """Return whether a user registered an encoder for a modality."""
    return modality in _makers


def load_encoder(
    reader: LanguageReader,
    expert: str,
    *,
    files: Mapping[str, bytes],
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Encoder:
    """Return the encoder of an expert.

    The one registered for its modality; else the expert's own; else, without a vision, audio or
    other model in its configuration, its connector.
    """
    record = reader.manifest.to_expert(expert)
    state = reader.read_encoder(expert, dtype=dtype)
    maker = _makers.get(record.modality)
    if maker is not None:
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
            reader.encoder_name(embedding, expert=expert),
            rebuild_weight(reader, embedding, expert=expert, dtype=dtype),
        ),
        placeholder=record.placeholder,
        dtype=dtype,
        device=device,
    )


def load_base_encoders(
    reader: LanguageReader,
    *,
    files: Mapping[str, bytes],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Encoder]:
    """Return the encoders of a multimodal base by modality, where no expert has an encoder.

    So experts of text alone leave the base its image or audio inputs.
    """
    records = reader.manifest.experts
    if not reader.is_multimodal or any(record.modality != "text" for record in records):
        return {}
    embedding = reader.family.find_embedding(reader.llm_names())
    assert embedding is not None  # a family is chosen by it
    encoders: dict[str, Encoder] = {}
    for key, modality in _BASE_MODALITIES.items():
        if not isinstance(reader.base_config.get(key), dict):
            continue
        encoders[modality] = MediaEncoder(
            expert="base",
            modality=modality,
            files=files,
            state=reader.read_base_encoder(dtype=dtype),
            embedding=(reader.stored_name(embedding), text_weight(reader, embedding, dtype=dtype)),
            placeholder=None,
            dtype=dtype,
            device=device,
        )
    return encoders


class _Checked:
    """A registered encoder whose embeddings are checked before they reach the language model."""

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
        request = self._request
        is_tensor = isinstance(embeds, torch.Tensor)
        if not is_tensor or embeds.ndim != 2 or embeds.shape[1] != request.hidden_size:
            shape = tuple(embeds.shape) if is_tensor else type(embeds).__name__
            raise PromptError(
                f"{part.kind}: the encoder registered for {request.modality!r} returned {shape},"
                f" expected embeddings [tokens, {request.hidden_size}]"
            )
        return embeds.to(request.device, request.dtype)
