"""Prompts as batches of embeddings, and what encoders make of real sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lab import data, tasks
from lab.points import PointLlamaForCausalLM

# markers that an expert's processor puts around an input
MEDIA_MARKS = {"audio": ("<|audio_bos|>", "<|audio_eos|>")}


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
    asked: Tensor  # [targets, 2], row and place of the token before each target
    targets: Tensor  # [targets], the words of the answers, and the end after each
    answers: Tensor  # [targets], the answer that each target is of

    def right(self, predicted: Tensor) -> Tensor:
        """Which answers [answers] are right, of the tokens [targets] found in the places asked."""
        num_answers = int(self.answers[-1]) + 1
        wrong = torch.zeros(num_answers, dtype=torch.long).index_add_(
            0, self.answers, (predicted.cpu() != self.targets).long()
        )
        return wrong == 0


class RowWriter:
    """Writes the rows of a batch piece by piece."""

    def __init__(self, word_ids: dict[str, int], *, edges: int = 0) -> None:
        """`edges`: positions beside the encoder's outputs, for learned tokens around them."""
        self.word_ids = word_ids
        self.edges = edges
        self.end_id = word_ids["</s>"]
        self.rows: list[tuple[list[int], list[bool], list[int], list[int]]] = []
        self.pool_rows: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.targets: list[int] = []
        self.answers: list[int] = []

    def begin(self) -> None:
        """Begin a row."""
        self.rows.append(([], [], [], []))
        self._sources, self._segment = 0, 0
        self.add_text("<s>")

    def add_text(self, text: str) -> None:
        """Write words of the sources."""
        self._write([self.word_ids[word] for word in text.split()], [False] * len(text.split()))
        self._sources = len(self.rows[-1][0])

    def add_medium(self, modality: str, length: int, pool_row: int) -> None:
        """Reserve positions for the encoder's output, between the expert's own markers."""
        marks = [
            self.word_ids[mark] for mark in MEDIA_MARKS.get(modality, ()) if mark in self.word_ids
        ]
        length += self.edges
        self._write(
            marks[:1] + [0] * length + marks[1:],
            [False] * len(marks[:1]) + [True] * length + [False] * len(marks[1:]),
        )
        self._sources = len(self.rows[-1][0])
        self.pool_rows.append(pool_row)

    def ask(self, question: str, answer: str) -> None:
        """Write a question, which may be empty, and its answer."""
        ids = self.rows[-1][0]
        answer_ids = [self.word_ids[word] for word in answer.split()]
        question_ids = [self.word_ids[word] for word in question.split()]
        self._segment += 1
        start = (
            (len(ids) if question_ids or self._segment > 1 else self._sources)
            + len(question_ids)
            - 1
        )
        self._write(question_ids + answer_ids, [False] * (len(question_ids) + len(answer_ids)))
        number = self.answers[-1] + 1 if self.answers else 0
        for offset, target in enumerate([*answer_ids, self.end_id]):
            self.asked.append((len(self.rows) - 1, start + offset))
            self.targets.append(target)
            self.answers.append(number)

    def _write(self, ids: list[int], media: list[bool]) -> None:
        row = self.rows[-1]
        first = self._sources if self._segment else len(row[0])
        row[0].extend(ids)
        row[1].extend(media)
        row[2].extend(range(first, first + len(ids)))
        row[3].extend([self._segment] * len(ids))

    def finish(self) -> Batch:
        """All rows as a batch."""
        longest = max(len(ids) for ids, *_ in self.rows)
        columns = [
            torch.tensor(
                [list(row[column]) + [0] * (longest - len(row[column])) for row in self.rows]
            )
            for column in range(4)
        ]
        ids, media, positions, segments = columns
        same = segments[:, :, None] == segments[:, None, :]
        attend = (same | (segments == 0)[:, None, :]) & torch.ones(longest, longest).tril().bool()
        return Batch(
            ids,
            media.bool(),
            torch.tensor(np.array(self.pool_rows, dtype=np.int64)),
            positions,
            attend[:, None],
            torch.tensor(self.asked),
            torch.tensor(self.targets),
            torch.tensor(self.answers),
        )


class Collator:
    """Turns prompts into batches; real sources are looked up in a pool by what they show."""

    def __init__(
        self, word_ids: dict[str, int], modality: str | None, pool: Pool | None, *, edges: int = 0
    ) -> None:
        """`edges`: see RowWriter."""
        self.word_ids = word_ids
        self.edges = edges
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
        writer = RowWriter(self.word_ids, edges=self.edges)
        for prompt in prompts:
            writer.begin()
            for piece in prompt.sources:
                if isinstance(piece, str):
                    writer.add_text(piece)
                else:
                    assert self.pool is not None
                    row = int(rng.choice(self.rows[piece.digit, piece.attribute]))
                    writer.add_medium(piece.modality, int(self.pool.lengths[row]), row)
            for question in prompt.questions:
                writer.ask(question.text, question.answer)
        return writer.finish()


def target_logits(
    language_model: nn.Module, head: nn.Module, embeddings: Tensor, batch: Batch
) -> Tensor:
    """Logits [targets, vocabulary] in the places asked."""
    device = embeddings.device
    hidden = language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.attend.to(device),
        position_ids=batch.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    rows, places = batch.asked.to(device).unbind(1)
    return head(hidden[rows, places])


def preprocess(modality: str, preprocessor: Any, values: Sequence[Any]) -> Tensor:
    """Return encoder inputs of images, audio, videos or point clouds.

    The mask of audio is the last row of its input.
    """
    if modality == "point":
        return torch.from_numpy(np.stack(list(values)))
    if modality == "image":
        return preprocessor(images=list(values), return_tensors="pt")["pixel_values"]
    if modality == "video":
        frames = [frame for video in values for frame in video]
        pixels = preprocessor(images=frames, return_tensors="pt", return_legacy_image_output=False)[
            "pixel_values"
        ]
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


def encode(
    modality: str, model: PreTrainedModel, inputs: Tensor, layer: int | None = None
) -> tuple[Tensor, Tensor]:
    """What the expert's encoder makes of its inputs, and how many outputs count.

    Of the vision towers, as LLaVA does by default, the last layer but one is taken.
    """
    inputs = inputs.to(model.device)
    if modality in ("image", "video"):
        layer = model.config.vision_feature_layer if layer is None else layer
    if modality == "point":
        features = model.point_encoder(inputs)
    elif modality == "image":
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


def find_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """The language model without its head, the head, and the connector (None: the base)."""
    if isinstance(model, PointLlamaForCausalLM):
        return model.model, model.lm_head, model.modal_projectors["point"]
    if isinstance(model, LlamaForCausalLM):
        return model.model, model.lm_head, None
    return model.model.language_model, model.lm_head, model.model.multi_modal_projector


def embed(model: PreTrainedModel, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
    """Token embeddings, with the connector's outputs in the places of the media."""
    device = model.device
    embeddings = model.get_input_embeddings()(batch.ids.to(device))
    connector = find_parts(model)[2]
    if len(batch.pool_rows) == 0 or connector is None:
        return embeddings
    counts = torch.arange(features.shape[1])[None] < lengths[:, None]
    connected = connector(features[counts].to(device))
    return embeddings.masked_scatter(batch.media.to(device)[..., None], connected)
