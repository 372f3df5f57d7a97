"""How many answers of a checkpoint are right: greedy decoding gives the answer and then the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from lab.batches import answer_logits, embed, encode, make_batch, preprocess
from mmerge.pipeline import Composite, Part

BATCH_SIZE = 50


@torch.no_grad()
def accuracy(
    modality: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    preprocessor: Any,
    examples: Sequence[tasks.Example],
) -> dict[str, float]:
    """Share of right answers for each task: greedy decoding gives the answer, then the end."""
    word_ids = tokenizer.get_vocab()
    language_model = model.model if modality == "text" else model.model.language_model
    right: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 100):
        chunk = examples[start : start + 100]
        features, lengths = torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.long)
        values = [part.value for e in chunk for part in e.parts if part.kind != "text"]
        if values:
            inputs = preprocess(modality, preprocessor, values)
            features, lengths = (x.cpu() for x in encode(modality, model, inputs))
        counts = iter(lengths.tolist())
        rows, asked, answers = [], [], []
        for row, example in enumerate(chunk):
            ids, media = [word_ids["<s>"]], [False]
            for part in example.parts:
                is_text = part.kind == "text"
                new = tokenizer(part.value, add_special_tokens=False)["input_ids"] if is_text else [0] * next(counts)
                ids, media = ids + new, media + [part.kind != "text"] * len(new)
            asked.append((row, len(ids) - 1))
            answers.append(word_ids[example.answer])
            ids, media = [*ids, answers[-1]], [*media, False]
            rows.append((ids, media, list(range(len(ids))), [0] * len(ids)))
        batch = make_batch(rows, range(len(values)), asked, answers)
        embeddings = embed(model, batch, features, lengths)
        first, second = answer_logits(language_model, model.lm_head, embeddings, batch)
        good = first.argmax(-1).cpu() == batch.answers
        good &= second.argmax(-1).cpu() == tokenizer.eos_token_id
        for example, is_right in zip(chunk, good.tolist(), strict=True):
            right.setdefault(example.task, []).append(is_right)
    return {task: sum(goods) / len(goods) for task, goods in right.items()}


def score_checkpoint(modality: str, folder: Path, examples: Sequence[tasks.Example]) -> dict[str, float]:
    """Share of right answers of the checkpoint in `folder`, for each task."""
    model, tokenizer = load_checkpoint("base" if modality == "text" else modality, folder)
    preprocessor = None if modality == "text" else models.build_preprocessor(modality)
    return accuracy(modality, model, tokenizer, preprocessor, examples)


def mixed_accuracy(composite: Composite, examples: Sequence[tasks.Example], *, only: str | None = None) -> float:
    """Share of right answers to prompts with several media; of media other than `only`, if given, nothing is shown."""
    prompts = [
        [Part(part.kind, part.value) for part in example.parts if only is None or part.kind in ("text", only)] for example in examples
    ]
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        answers += composite.generate_batch(prompts[start : start + BATCH_SIZE], max_new_tokens=3)
    return float(np.mean([answer == example.answer for answer, example in zip(answers, examples, strict=True)]))


def load_checkpoint(part: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a checkpoint again and see to it that no tensor is missing and none is left over."""
    auto = AutoModelForCausalLM if part == "base" else AutoModelForMultimodalLM
    model, info = auto.from_pretrained(folder, dtype="float32", output_loading_info=True)
    problems = {name: found for name, found in info.items() if found}
    if problems:
        raise RuntimeError(f"{folder} does not load cleanly: {problems}")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def ask_expert(modality: str, model: PreTrainedModel, folder: Path, example: tasks.Example) -> str:
    """An expert's answer by its own processor and `generate`, as any user would ask it."""
    placeholder = models.PLACEHOLDERS[modality]
    text = " ".join(p.value if p.kind == "text" else placeholder for p in example.parts)
    (value,) = (part.value for part in example.parts if part.kind != "text")
    if modality == "video":  # VideoLlavaProcessor needs torchvision
        tokenizer = AutoTokenizer.from_pretrained(folder)
        images = AutoImageProcessor.from_pretrained(folder)
        pixels = preprocess(modality, images, [value])
        count = model.config.video_seq_length
        inputs = tokenizer(text.replace(placeholder, placeholder * count), return_tensors="pt")
        inputs["pixel_values_videos"] = pixels
    else:
        processor = AutoProcessor.from_pretrained(folder)
        tokenizer = processor.tokenizer
        if modality == "image":
            inputs = processor(text=text, images=value, return_tensors="pt")
        else:
            inputs = processor(text=text, audio=[value], sampling_rate=data.SAMPLE_RATE, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check(parts: Sequence[str], out: Path, split: str, num_examples: int) -> None:
    """Load each checkpoint again, print its accuracies and compare with `generate`."""
    for part in parts:
        modality = "text" if part == "base" else part
        model, tokenizer = load_checkpoint(part, out / part)
        preprocessor = None if part == "base" else models.build_preprocessor(modality)
        examples = tasks.make_examples(modality, split=split, num_examples=num_examples, seed=1)
        scores = accuracy(modality, model, tokenizer, preprocessor, examples)
        print(f"{part}: {split} accuracy {np.mean(list(scores.values())):.3f} {scores}")
        if part == "base":
            continue
        for example in examples[:10]:
            answer = ask_expert(modality, model, out / part, example)
            score = accuracy(modality, model, tokenizer, preprocessor, [example])[example.task]
            if (answer == example.answer) != bool(score):
                raise RuntimeError(f"{part}: generate and accuracy disagree about {example}")
