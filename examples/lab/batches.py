"""Prompts as batches of embeddings, and what encoders make of real sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lab import data, tasks


@dataclass
class Pool:
    """Real sources with their labels and what the encoder makes of them."""

    digits: np.ndarray
    attributes: np.ndarray
    inputs: Tensor
    lengths: Tensor  # number of encoder outputs that count
    features: Tensor | None = None  # [size, length, width]


@dataclass
class Batch:
    """Prompts as token ids (0 in the places of media), padded on the right.

    A prompt is followed by all its questions and their answers. `attend` and `positions` make
    each question see the sources and itself alone, as if it had been asked by itself.
    """

    ids: Tensor  # [rows, length]
    media: Tensor  # [rows, length], places of media
    pool_rows: Tensor  # rows of the pool that go there
    positions: Tensor  # [rows, length]
    attend: Tensor  # [rows, 1, length, length]
    asked: Tensor  # [answers, 2], row and place of a question's last token
    answers: Tensor  # [answers]


class Collator:
    """Turns prompts into batches; real sources are looked up in a pool by what they show."""

    def __init__(self, word_ids: dict[str, int], modality: str | None, pool: Pool | None) -> None:
        self.word_ids = word_ids
        self.modality = modality
        self.pool = pool
        self.rows: dict[tuple[int, str], np.ndarray] = {}
        if pool is not None and modality is not None:
            for digit in range(10):
                for index, attribute in enumerate(tasks.ATTRIBUTES[modality]):
                    shown = (pool.digits == digit) & (pool.attributes == index)
                    self.rows[digit, attribute] = np.flatnonzero(shown)

    def length(self, prompt: tasks.Prompt) -> int:
        """About how many tokens the sources have."""
        return sum(len(p.split()) if isinstance(p, str) else 16 for p in prompt.sources)

    def __call__(self, prompts: Sequence[tasks.Prompt], rng: np.random.Generator) -> Batch:
        """Prompts as a batch, their real sources picked from the pool at random."""
        rows, pool_rows, asked, answers = [], [], [], []
        for row, prompt in enumerate(prompts):
            ids, media = [self.word_ids["<s>"]], [False]
            for piece in prompt.sources:
                if isinstance(piece, str):
                    new = [self.word_ids[word] for word in piece.split()]
                else:
                    assert self.pool is not None
                    pool_rows.append(rng.choice(self.rows[piece.digit, piece.attribute]))
                    new = [0] * int(self.pool.lengths[pool_rows[-1]])
                ids, media = ids + new, media + [not isinstance(piece, str)] * len(new)
            before = len(ids)
            positions, segments = list(range(before)), [0] * before
            for index, question in enumerate(prompt.questions):
                words = [*question.text.split(), question.answer]
                ids += [self.word_ids[word] for word in words]
                positions += range(before, before + len(words))
                segments += [index + 1] * len(words)
                asked.append((row, len(ids) - 2))
                answers.append(ids[-1])
            rows.append((ids, media + [False] * (len(ids) - before), positions, segments))
        return make_batch(rows, pool_rows, asked, answers)


def make_batch(
    rows: Sequence[tuple[list[int], list[bool], list[int], list[int]]],
    pool_rows: Sequence[int],
    asked: Sequence[tuple[int, int]],
    answers: Sequence[int],
) -> Batch:
    """A batch from each row's ids, places of media, positions and segments (0: the sources)."""
    longest = max(len(ids) for ids, *_ in rows)
    columns = [torch.tensor([list(row[column]) + [0] * (longest - len(row[column])) for row in rows]) for column in range(4)]
    ids, media, positions, segments = columns
    same = segments[:, :, None] == segments[:, None, :]
    attend = (same | (segments == 0)[:, None, :]) & torch.ones(longest, longest).tril().bool()
    return Batch(
        ids,
        media.bool(),
        torch.tensor(np.array(pool_rows, dtype=np.int64)),
        positions,
        attend[:, None],
        torch.tensor(asked),
        torch.tensor(answers),
    )


def answer_logits(language_model: nn.Module, head: nn.Module, embeddings: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits at the last token of each question, and at the right answer after it."""
    device = embeddings.device
    hidden = language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.attend.to(device),
        position_ids=batch.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    rows, places = batch.asked.to(device).unbind(1)
    return head(hidden[rows, places]), head(hidden[rows, places + 1])


def preprocess(modality: str, preprocessor: Any, values: Sequence[Any]) -> Tensor:
    """Encoder inputs of images, sounds or videos; a sound's mask is its input's last row."""
    if modality == "image":
        return preprocessor(images=list(values), return_tensors="pt")["pixel_values"]
    if modality == "video":
        frames = [frame for video in values for frame in video]
        pixels = preprocessor(images=frames, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
        return pixels.unflatten(0, (len(values), -1))
    sounds = preprocessor(
        list(values),
        sampling_rate=data.SAMPLE_RATE,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = sounds["attention_mask"].unsqueeze(1).to(torch.float32)
    return torch.cat([sounds["input_features"], mask], dim=1)


def encode(modality: str, model: PreTrainedModel, inputs: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
    """What the expert's encoder makes of its inputs, and how many outputs count.

    Of the vision towers, as LLaVA does by default, the last layer but one is taken.
    """
    inputs = inputs.to(model.device)
    if modality in ("image", "video"):
        layer = model.config.vision_feature_layer if layer is None else layer
    if modality == "image":
        tower = model.model.vision_tower
        features = tower(inputs, output_hidden_states=True).hidden_states[layer][:, 1:]
    elif modality == "video":
        tower = model.model.video_tower
        frames = tower(inputs.flatten(0, 1), output_hidden_states=True).hidden_states[layer]
        features = frames.unflatten(0, inputs.shape[:2]).flatten(1, 2)
    else:
        tower = model.model.audio_tower
        spectrum, mask = inputs[:, :-1], inputs[:, -1].sum(-1).long()
        within, lengths = tower._get_feat_extract_output_lengths(mask)
        places = torch.arange(spectrum.shape[-1] // 2, device=inputs.device)
        seen = (places[None] < within[:, None])[:, None, None]
        return tower(spectrum, attention_mask=seen).last_hidden_state, lengths
    return features, torch.full((len(features),), features.shape[1], device=features.device)


def embed(model: PreTrainedModel, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
    """Token embeddings, with the connector's outputs in the places of the media."""
    device = model.device
    embeddings = model.get_input_embeddings()(batch.ids.to(device))
    if len(batch.pool_rows) == 0:
        return embeddings
    counts = torch.arange(features.shape[1])[None] < lengths[:, None]
    connected = model.model.multi_modal_projector(features[counts].to(device))
    return embeddings.masked_scatter(batch.media.to(device)[..., None], connected)
