"""Checks of trained models: reload from files, ask, compare with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab import models, tasks, twins
from lab.evaluate import accuracy, ask_expert, load_checkpoint


def check_all(parts: Sequence[str], out: Path, *, split: str, num_examples: int) -> None:
    """Print the accuracies of each part.

    Raises RuntimeError if `generate` gives a different answer.
    """
    for part in parts:
        group, _, modality = part.rpartition("/")
        modality, _, is_new = modality.partition("_")
        if modality == "base":
            modality = "text"
        examples = tasks.make_examples(modality, split=split, num_examples=num_examples, seed=1)
        if is_new:
            kinds = [tasks.NEW_QUESTIONS[modality]]
            examples += tasks.make_examples(
                modality, split=split, num_examples=num_examples // 5, seed=1, kinds=kinds
            )
        if group:
            scores = twins.score_twin(modality, out, examples)
        else:
            model, tokenizer = load_checkpoint(
                "base" if modality == "text" else modality, out / part
            )
            scores = accuracy(
                modality, model, tokenizer, models.build_preprocessor(modality), examples
            )
        kept = {task: round(score, 3) for task, score in scores.items()}
        print(f"{part}: {split} accuracy {np.mean(list(scores.values())):.3f} {kept}", flush=True)
        if group or modality in ("text", "point"):
            continue
        for example in examples[:12]:
            answer = ask_expert(modality, model, out / part, example)
            score = accuracy(
                modality, model, tokenizer, models.build_preprocessor(modality), [example]
            )[example.task]
            if (answer == example.answer) != bool(score):
                raise RuntimeError(f"{part}: generate and accuracy disagree about {example}")
