"""How many answers of a checkpoint are right: greedy decoding gives the answer and then the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lab import data, models, tasks
from lab.batches import Batch, RowWriter, embed, encode, find_parts, preprocess, target_logits
from lab.points import PointLlamaForCausalLM
from mmerge.pipeline import Composite, Part

BATCH_SIZE = 50
MAX_NEW_TOKENS = 8


class Answerer(Protocol):
    """A model that answers about what another one has encoded."""

    edges: int
    """See RowWriter."""

    def find_parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """See find_parts."""

    def embed(self, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        """See embed."""


@torch.no_grad()
def accuracy(
    modality: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    preprocessor: Any,
    examples: Sequence[tasks.Example],
    *,
    answerer: Answerer | None = None,
) -> dict[str, float]:
    """Share of right answers for each task: greedy decoding gives the answer, then the end.

    With an `answerer`, the model only encodes the media.
    """
    word_ids = tokenizer.get_vocab()
    language_model, head, _ = answerer.find_parts() if answerer else find_parts(model)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 100):
        chunk = examples[start : start + 100]
        features, lengths = torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.long)
        values = [part.value for e in chunk for part in e.parts if part.kind != "text"]
        if values:
            inputs = preprocess(modality, preprocessor, values)
            features, lengths = (x.cpu() for x in encode(modality, model, inputs))
        writer = RowWriter(word_ids, edges=answerer.edges if answerer else 0)
        for example in chunk:
            writer.begin()
            for part in example.parts:
                if part.kind == "text":
                    writer.add_text(part.value)
                else:
                    row = len(writer.pool_rows)
                    writer.add_medium(part.kind, int(lengths[row]), row)
            writer.ask("", example.answer)
        batch = writer.finish()
        embeddings = (
            answerer.embed(batch, features, lengths)
            if answerer
            else embed(model, batch, features, lengths)
        )
        logits = target_logits(language_model, head, embeddings, batch)
        # Each word is predicted after the right words before it: all predictions are right exactly
        # if greedy decoding gives the answer.
        for example, is_right in zip(chunk, batch.right(logits.argmax(-1)).tolist(), strict=True):
            right.setdefault(example.task, []).append(is_right)
    return {task: sum(goods) / len(goods) for task, goods in right.items()}


def score_checkpoint(
    modality: str, folder: Path, examples: Sequence[tasks.Example]
) -> dict[str, float]:
    """Share of right answers of the checkpoint in `folder`, for each task."""
    model, tokenizer = load_checkpoint("base" if modality == "text" else modality, folder)
    preprocessor = None if modality == "text" else models.build_preprocessor(modality)
    return accuracy(modality, model, tokenizer, preprocessor, examples)


def mixed_accuracy(
    composite: Composite, examples: Sequence[tasks.Example], *, only: str | None = None
) -> float:
    """Return the share of right answers to prompts with several inputs.

    With `only`, inputs of other modalities are not shown.
    """
    prompts = [
        [
            Part(part.kind, part.value)
            for part in example.parts
            if only is None or part.kind in ("text", only)
        ]
        for example in examples
    ]
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        answers += composite.generate_batch(
            prompts[start : start + BATCH_SIZE], max_new_tokens=MAX_NEW_TOKENS
        )
    return float(
        np.mean(
            [answer == example.answer for answer, example in zip(answers, examples, strict=True)]
        )
    )


def load_checkpoint(part: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a checkpoint again and see to it that no tensor is missing and none is left over."""
    auto = {"base": AutoModelForCausalLM, "point": PointLlamaForCausalLM}.get(
        part, AutoModelForMultimodalLM
    )
    model, info = auto.from_pretrained(
        folder, dtype="float32", output_loading_info=True, trust_remote_code=False
    )
    problems = {name: names for name, names in info.items() if names}
    if problems:
        raise RuntimeError(f"{folder} does not load cleanly: {problems}")
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@torch.no_grad()
def ask_expert(modality: str, model: PreTrainedModel, folder: Path, example: tasks.Example) -> str:
    """An expert's answer by its own processor and `generate`, as any user would ask it."""
    placeholder = models.PLACEHOLDERS[modality]
    text = " ".join(p.value if p.kind == "text" else placeholder for p in example.parts)
    (value,) = (part.value for part in example.parts if part.kind != "text")
    if modality == "video":  # VideoLlavaProcessor needs torchvision
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        pixels = preprocess(modality, images, [value])
        count = model.config.video_seq_length
        inputs = tokenizer(text.replace(placeholder, placeholder * count), return_tensors="pt")
        inputs["pixel_values_videos"] = pixels
    else:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = processor.tokenizer
        if modality == "image":
            inputs = processor(text=text, images=value, return_tensors="pt")
        else:
            inputs = processor(
                text=text, audio=[value], sampling_rate=data.SAMPLE_RATE, return_tensors="pt"
            )
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
