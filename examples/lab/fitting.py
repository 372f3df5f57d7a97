"""Shared parts of training: optimizer loop, answer loss, streams of random prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lab import tasks
from lab.batches import Batch, Collator, target_logits

NUM_QUESTIONS = 5
SHARE_ALONE = 0.35  # of an expert's prompts: its real source alone
SHARE_TOGETHER = 0.45  # its real source beside described ones; the rest is text alone
SHARE_SHARING = 0.35  # of the prompts with several sources: they ask what all digits share
END_WEIGHT = 0.1  # of the end after an answer, in the loss


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    name: str,
    groups: list[dict[str, Any]],
    loss_of_step: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """AdamW over the parameter groups; `loss_of_step` gives the loss and the accuracy."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _schedule(step, steps, min(100, steps // 10))
    )
    parameters = [p for group in groups for p in group["params"]]
    begin = time.time()
    for step in range(steps):
        loss, accuracy = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"{name}: step {step + 1}/{steps} loss {loss.item():.3f} accuracy"
                f" {accuracy.item():.3f} ({time.time() - begin:.0f} s)",
                flush=True,
            )


def answer_loss(
    language_model: nn.Module, head: nn.Module, embeddings: Tensor, batch: Batch, *, end_id: int
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers and of the end after them; share of answers that are right."""
    logits = target_logits(language_model, head, embeddings, batch)
    targets = batch.targets.to(logits.device)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * torch.where(targets == end_id, END_WEIGHT, 1.0)).sum() / (
        targets == end_id
    ).sum()
    return loss, batch.right(logits.argmax(-1)).float().mean()


def stream_batches(
    make: Callable[[], tasks.Prompt],
    collate: Collator,
    *,
    rng: np.random.Generator,
    batch_size: int,
) -> Iterator[Batch]:
    """Batches without end, each of prompts of about the same length."""
    while True:
        prompts = sorted((make() for _ in range(8 * batch_size)), key=collate.length)
        for index in rng.permutation(8):
            yield collate(prompts[index * batch_size : (index + 1) * batch_size], rng)


def make_text_prompt(
    rng: np.random.Generator, *, questions: Sequence[str] = tasks.BASE_QUESTIONS
) -> tasks.Prompt:
    """A prompt to train on whose sources are all described in words."""
    modalities = _random_sources(rng)
    return tasks.make_prompt(
        modalities, (), rng=rng, kinds=_random_kinds(modalities, questions, rng), filler=True
    )


def make_expert_prompt(modality: str, rng: np.random.Generator) -> tasks.Prompt:
    """Return a prompt to train an expert on.

    It has one real input, alone or beside described ones, or only words.
    """
    share = rng.random()
    if share >= SHARE_ALONE + SHARE_TOGETHER:
        return make_text_prompt(rng)
    modalities = [modality]
    if share >= SHARE_ALONE:
        others = [m for m in tasks.MODALITIES if m != modality]
        modalities += rng.permutation(others)[: rng.integers(1, len(others) + 1)].tolist()
    kinds = _random_kinds(modalities, tasks.BASE_QUESTIONS, rng)
    return tasks.make_prompt(modalities, [modality], rng=rng, kinds=kinds, filler=True)


def make_new_prompt(modality: str, rng: np.random.Generator) -> tasks.Prompt:
    """A prompt that asks an expert its new task and nothing else."""
    modalities = [modality]
    if rng.random() >= 0.6:
        others = [m for m in tasks.MODALITIES if m != modality]
        modalities += rng.permutation(others)[: rng.integers(1, len(others) + 1)].tolist()
    return tasks.make_prompt(
        modalities, [modality], rng=rng, kinds=[tasks.NEW_QUESTIONS[modality]], filler=True
    )


def _random_kinds(
    modalities: Sequence[str], questions: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """The kinds of the questions of one training prompt, out of `questions`."""
    kinds = [kind for kind in questions if kind in tasks.SINGLE_QUESTIONS]
    if len(modalities) == 1:
        return [kinds[index] for index in rng.permutation(len(kinds))[:NUM_QUESTIONS]]
    # where exactly one property is shared, two inputs rarely show the same digit
    sharing = rng.random() < SHARE_SHARING
    kinds += ["bigger"] if sharing else tasks.JOINT_QUESTIONS
    chosen = [kinds[index] for index in rng.permutation(len(kinds))[: NUM_QUESTIONS - sharing]]
    return [*chosen, tasks.SHARE] if sharing else chosen


def _random_sources(rng: np.random.Generator) -> list[str]:
    """One to four modalities in any order."""
    count = rng.choice([1, 2, 3, 4], p=[0.2, 0.45, 0.2, 0.15])
    return rng.permutation(tasks.MODALITIES)[:count].tolist()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save the weights, rounded to bfloat16."""
    text = model.config.get_text_config()
    text._name_or_path, text.dtype = "", torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
