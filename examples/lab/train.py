"""Train the base and the three experts of the laboratory from nothing.

    python examples/lab/train.py [--out DIR] [--seed 0] [--device auto]

writes DIR/{base,image,audio,video}, each in the Hugging Face layout with bfloat16 weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import data, models, tasks
from lab.batches import Batch, Collator, Pool, answer_logits, embed, encode, preprocess
from lab.evaluate import check

BATCH_SIZE = 32
NUM_QUESTIONS = 5
BASE_STEPS = 1200
BASE_RATE = 2e-3
ENCODER_BATCH = 64
ENCODER_STEPS = {"image": 2000, "audio": 500, "video": 2000}
ENCODER_RATE = 2e-3
EXPERT_STEPS = {"image": 600, "audio": 600, "video": 900}
EXPERT_RATE = 5e-4
SHARE_ALONE = 0.35  # of an expert's prompts: its real source alone
SHARE_TOGETHER = 0.45  # its real source beside described ones; the rest is text alone
POOL_SIZE = 8000


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _fit(
    name: str,
    groups: list[dict[str, Any]],
    loss_of_step: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """AdamW over the parameter groups; `loss_of_step` gives the loss and the accuracy."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps, min(100, steps // 10)))
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
                f"{name}: step {step + 1}/{steps} loss {loss.item():.3f} accuracy {accuracy.item():.3f} ({time.time() - begin:.0f} s)",
                flush=True,
            )


def _answer_loss(language_model: nn.Module, head: nn.Module, embeddings: Tensor, batch: Batch, end_id: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers and of the end after them; share of answers that are right."""
    first, second = answer_logits(language_model, head, embeddings, batch)
    answers = batch.answers.to(first.device)
    ends = torch.full_like(answers, end_id)
    loss = nn.functional.cross_entropy(first, answers)
    loss = loss + 0.1 * nn.functional.cross_entropy(second, ends)
    right = (first.argmax(-1) == answers) & (second.argmax(-1) == ends)
    return loss, right.float().mean()


def _stream(make: Callable[[], tasks.Prompt], collate: Collator, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches without end, each of prompts of about the same length."""
    while True:
        prompts = sorted((make() for _ in range(8 * BATCH_SIZE)), key=collate.length)
        for index in rng.permutation(8):
            yield collate(prompts[index * BATCH_SIZE : (index + 1) * BATCH_SIZE], rng)


def _random_kinds(modalities: Sequence[str], real: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The kinds of the questions of one training prompt."""
    kinds = (*tasks.SINGLE_QUESTIONS, *tasks.JOINT_QUESTIONS) if real else tasks.BASE_QUESTIONS
    if len(modalities) == 1:
        kinds = tuple(kind for kind in kinds if kind not in tasks.JOINT_QUESTIONS)
    return [kinds[index] for index in rng.permutation(len(kinds))[:NUM_QUESTIONS]]


def _random_sources(rng: np.random.Generator) -> list[str]:
    """One to three modalities in any order."""
    count = rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25])
    return rng.permutation(tasks.MODALITIES)[:count].tolist()


# --- base ---------------------------------------------------------------------------------------


def train_base(out: Path, seed: int, device: torch.device) -> None:
    """Train the base on prompts in which every source is described in words."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    tokenizer = models.build_tokenizer()
    model = models.build_base(tokenizer).to(device)
    collate = Collator(tokenizer.get_vocab(), None, None)

    def make() -> tasks.Prompt:
        modalities = _random_sources(rng)
        return tasks.make_prompt(modalities, (), rng=rng, kinds=_random_kinds(modalities, (), rng), filler=True)

    batches = _stream(make, collate, rng)

    # A small model finds it hard to tell which source a word belongs to, or is asked for. A linear head, thrown away
    # afterwards, teaches the first layer to; without it the accuracy stays near 0.5 for thousands of steps.
    source_head = nn.Linear(model.config.hidden_size, len(tasks.MODALITIES)).to(device)
    first_layer: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: first_layer.append(output))

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        first_layer.clear()
        embeddings = model.model.embed_tokens(batch.ids.to(device))
        loss, accuracy = _answer_loss(model.model, model.lm_head, embeddings, batch, tokenizer.eos_token_id)
        labels = _source_labels(batch.ids, tokenizer.get_vocab()).to(device)
        logits = source_head(first_layer[0])
        return loss + 0.5 * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), accuracy

    parameters = [*model.parameters(), *source_head.parameters()]
    _fit("base", [{"params": parameters, "lr": BASE_RATE}], loss_of_step, BASE_STEPS)
    hook.remove()
    _save(model, out / "base")
    tokenizer.save_pretrained(out / "base")


def _source_labels(ids: Tensor, word_ids: dict[str, int]) -> Tensor:
    """For each token [rows, length], the source that was named last before it; -100 where none was, in its own question or before."""
    words = torch.tensor([word_ids[word] for word in tasks.SOURCE_WORDS.values()])
    is_word = ids[..., None] == words
    places = torch.arange(ids.shape[1]).expand_as(ids)
    latest = torch.where(is_word.any(-1), places, 0).cummax(1).values
    labels = is_word.float().argmax(-1).gather(1, latest)
    question = torch.where(ids == word_ids["question"], places, 0).cummax(1).values
    return labels.masked_fill((latest == 0) | (question > latest), -100)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save the weights, rounded to bfloat16."""
    text = model.config.get_text_config()
    text._name_or_path, text.dtype = "", torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


# --- encoders -----------------------------------------------------------------------------------


def make_pool(modality: str, preprocessor: Any, seed: int) -> Pool:
    """Draw the training sources of one modality."""
    rng = np.random.default_rng([seed, 2, tasks.MODALITIES.index(modality)])
    options = tasks.ATTRIBUTES[modality]
    digits = np.arange(POOL_SIZE) % 10
    attributes = rng.integers(len(options), size=POOL_SIZE)
    inputs = []
    for start in range(0, POOL_SIZE, 500):
        values = []
        part = slice(start, start + 500)
        for digit, index in zip(digits[part], attributes[part], strict=True):
            source = tasks.Source(modality, int(digit), options[index], True)
            values.append(tasks.draw_source(source, split="train", rng=rng))
        inputs.append(preprocess(modality, preprocessor, values))
    return Pool(digits, attributes, torch.cat(inputs), torch.zeros(POOL_SIZE, dtype=torch.long))


def train_encoder(modality: str, model: PreTrainedModel, pool: Pool, seed: int) -> None:
    """Teach the encoder, under two linear heads that are then thrown away, what sources show."""
    torch.manual_seed(seed + 10)
    device = model.device
    tower = model.model.audio_tower if modality == "audio" else None
    if tower is None:
        tower = model.model.video_tower if modality == "video" else model.model.vision_tower
    width = 64
    frames = data.NUM_FRAMES if modality == "video" else 1
    digit_head = nn.Linear(width, 10).to(device)
    attribute_head = nn.Linear(width * frames, len(tasks.ATTRIBUTES[modality])).to(device)
    digits = torch.tensor(pool.digits, device=device)
    attributes = torch.tensor(pool.attributes, device=device)
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(POOL_SIZE, (ENCODER_BATCH,), generator=generator)
        features, lengths = encode(modality, model, pool.inputs[rows], layer=-1)
        counts = torch.arange(features.shape[1], device=device)[None] < lengths[:, None]
        mean = (features * counts[..., None]).sum(1) / lengths[:, None]
        per_frame = features.unflatten(1, (frames, -1)).mean(2).flatten(1)
        rows = rows.to(device)
        digit_logits = digit_head(mean)
        attribute_logits = attribute_head(per_frame if frames > 1 else mean)
        loss = nn.functional.cross_entropy(digit_logits, digits[rows])
        loss = loss + nn.functional.cross_entropy(attribute_logits, attributes[rows])
        right = (digit_logits.argmax(-1) == digits[rows]) & (attribute_logits.argmax(-1) == attributes[rows])
        return loss, right.float().mean()

    parameters = [p for p in tower.parameters() if p.requires_grad]
    parameters += [*digit_head.parameters(), *attribute_head.parameters()]
    _fit(
        f"{modality} encoder",
        [{"params": parameters, "lr": ENCODER_RATE}],
        loss_of_step,
        ENCODER_STEPS[modality],
    )
    # from here on the encoder stays as it will be saved
    tower.to(torch.bfloat16).to(torch.float32).requires_grad_(False)
    if modality == "video":
        model.model.image_tower.load_state_dict(tower.state_dict())
        model.model.image_tower.requires_grad_(False)
    with torch.no_grad():
        pieces = [encode(modality, model, part) for part in pool.inputs.split(500)]
    pool.features = torch.cat([features.cpu() for features, _ in pieces])
    pool.lengths = torch.cat([lengths.cpu() for _, lengths in pieces])


# --- experts ------------------------------------------------------------------------------------


def train_expert(modality: str, out: Path, seed: int, device: torch.device) -> None:
    """Tune an encoder, then the connector and the whole language model, on one modality."""
    torch.manual_seed(seed + 1)
    rng = np.random.default_rng([seed, 3, tasks.MODALITIES.index(modality)])
    model, tokenizer = models.build_expert(modality, out / "base")
    model = model.to(device)
    preprocessor = models.build_preprocessor(modality)
    begin = time.time()
    pool = make_pool(modality, preprocessor, seed)
    print(f"{modality}: {POOL_SIZE} sources drawn ({time.time() - begin:.0f} s)", flush=True)
    train_encoder(modality, model, pool, seed)
    collate = Collator(tokenizer.get_vocab(), modality, pool)

    def make() -> tasks.Prompt:
        share = rng.random()
        modalities, real = _random_sources(rng), [modality]
        if share < SHARE_ALONE:
            modalities = [modality]
        elif share < SHARE_ALONE + SHARE_TOGETHER:
            others = [m for m in tasks.MODALITIES if m != modality]
            modalities = [modality, *rng.permutation(others)[: rng.integers(1, 3)].tolist()]
        else:
            real = []
        kinds = _random_kinds(modalities, real, rng)
        return tasks.make_prompt(modalities, real, rng=rng, kinds=kinds, filler=True)

    batches = _stream(make, collate, rng)
    assert pool.features is not None
    pool_features, pool_lengths = pool.features, pool.lengths

    # What a film shows takes several of its tokens to tell. A linear head, thrown away afterwards, asks the second layer for
    # the attribute at the medium's last token; without it the direction of a film stays near a guess.
    attribute_head = nn.Linear(model.config.get_text_config().hidden_size, len(tasks.ATTRIBUTES[modality])).to(device)
    attributes = torch.tensor(pool.attributes)
    second_layer: list[Tensor] = []
    hook = model.model.language_model.layers[1].register_forward_hook(lambda module, args, output: second_layer.append(output))

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        second_layer.clear()
        embeddings = embed(model, batch, pool_features[batch.pool_rows], pool_lengths[batch.pool_rows])
        loss, accuracy = _answer_loss(model.model.language_model, model.lm_head, embeddings, batch, tokenizer.eos_token_id)
        rows, last = batch.media.any(1), (batch.media * torch.arange(batch.media.shape[1])).amax(1)
        if rows.any():
            logits = attribute_head(second_layer[0][rows.nonzero()[:, 0], last[rows]])
            loss = loss + 0.3 * nn.functional.cross_entropy(logits, attributes[batch.pool_rows].to(device))
        return loss, accuracy

    connector = list(model.model.multi_modal_projector.parameters())
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    _fit(
        f"{modality} expert",
        [
            {"params": language, "lr": EXPERT_RATE, "weight_decay": 0.0},
            {"params": [*connector, *attribute_head.parameters()], "lr": EXPERT_RATE},
        ],
        loss_of_step,
        EXPERT_STEPS[modality],
    )
    hook.remove()
    _save(model, out / modality)
    models.save_preprocessor(modality, tokenizer, preprocessor, out / modality)


def main() -> None:
    """Train everything, check that it loads again and print the accuracies."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=here / "checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parts = ["base", *tasks.MODALITIES]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="train these alone")
    args = parser.parse_args()
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    begin = time.time()
    for part in args.only:
        if part == "base":
            train_base(args.out, args.seed, device)
        else:
            train_expert(part, args.out, args.seed, device)
    print(f"trained in {time.time() - begin:.0f} s")
    check(args.only, args.out, "test", 600)


if __name__ == "__main__":
    main()
