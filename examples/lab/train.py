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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import data, models, tasks

BATCH_SIZE = 32
NUM_QUESTIONS = 5
BASE_STEPS = 1000
FIRST_STEPS = 300
BASE_RATE = 2e-3
ENCODER_BATCH = 64
ENCODER_STEPS = {"image": 2000, "audio": 500, "video": 2000}
ENCODER_RATE = 2e-3
EXPERT_STEPS = 600
EXPERT_RATE = 1e-3
SHARE_ALONE = 0.35  # of an expert's prompts: its real source alone
SHARE_TOGETHER = 0.45  # its real source beside described ones; the rest is text alone
POOL_SIZE = 8000


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


# --- prompts as batches -------------------------------------------------------------------------


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
    made = 0

    def make() -> tasks.Prompt:
        nonlocal made
        modalities = _random_sources(rng)
        kinds = _random_kinds(modalities, (), rng)
        if made < FIRST_STEPS * BATCH_SIZE:  # first of all learn to pick a source by its name
            kinds = ["digit", "digit", "digit"]
        made += 1
        return tasks.make_prompt(modalities, (), rng=rng, kinds=kinds, filler=True)

    batches = _stream(make, collate, rng)

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        embeddings = model.model.embed_tokens(batch.ids.to(device))
        return _answer_loss(model.model, model.lm_head, embeddings, batch, tokenizer.eos_token_id)

    _fit("base", [{"params": list(model.parameters()), "lr": BASE_RATE}], loss_of_step, BASE_STEPS)
    _save(model, out / "base")
    tokenizer.save_pretrained(out / "base")


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save the weights, rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)


# --- encoders -----------------------------------------------------------------------------------


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


def embed(model: PreTrainedModel, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
    """Token embeddings, with the connector's outputs in the places of the media."""
    device = model.device
    embeddings = model.get_input_embeddings()(batch.ids.to(device))
    if len(batch.pool_rows) == 0:
        return embeddings
    counts = torch.arange(features.shape[1])[None] < lengths[:, None]
    connected = model.model.multi_modal_projector(features[counts].to(device))
    return embeddings.masked_scatter(batch.media.to(device)[..., None], connected)


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

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        embeddings = embed(model, batch, pool_features[batch.pool_rows], pool_lengths[batch.pool_rows])
        return _answer_loss(model.model.language_model, model.lm_head, embeddings, batch, tokenizer.eos_token_id)

    connector = list(model.model.multi_modal_projector.parameters())
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    _fit(
        f"{modality} expert",
        [
            {"params": language, "lr": EXPERT_RATE, "weight_decay": 0.0},
            {"params": connector, "lr": EXPERT_RATE},
        ],
        loss_of_step,
        EXPERT_STEPS,
    )
    _save(model, out / modality)
    models.save_preprocessor(modality, tokenizer, preprocessor, out / modality)


# --- checks -------------------------------------------------------------------------------------


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


def _load(part: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
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
        model, tokenizer = _load(part, out / part)
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
