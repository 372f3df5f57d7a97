"""Training inputs of a modality, the training of its encoder, and their features."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lab import data, tasks
from lab.batches import Pool, encode, preprocess
from lab.fitting import fit
from lab.sizes import Size

ENCODER_BATCH = 64


def make_pool(modality: str, preprocessor: Any, *, pool_size: int, seed: int) -> Pool:
    """Draw the training sources of one modality."""
    begin = time.time()
    rng = np.random.default_rng([seed, 2, tasks.MODALITIES.index(modality)])
    options = tasks.ATTRIBUTES[modality]
    digits = np.arange(pool_size) % 10
    attributes = rng.integers(len(options), size=pool_size)
    inputs = []
    for start in range(0, pool_size, 500):
        values = []
        part = slice(start, start + 500)
        for digit, index in zip(digits[part], attributes[part], strict=True):
            source = tasks.Source(modality, int(digit), options[index], True)
            values.append(tasks.draw_source(source, split="train", rng=rng))
        inputs.append(preprocess(modality, preprocessor, values))
    print(f"{modality}: {pool_size} sources drawn ({time.time() - begin:.0f} s)", flush=True)
    return Pool(digits, attributes, torch.cat(inputs), torch.zeros(pool_size, dtype=torch.long))


def find_tower(modality: str, model: PreTrainedModel) -> nn.Module:
    """The expert's encoder."""
    if modality == "point":
        return model.point_encoder
    name = {"image": "vision_tower", "audio": "audio_tower", "video": "video_tower"}[modality]
    return getattr(model.model, name)


def train_encoder(
    modality: str, model: PreTrainedModel, pool: Pool, size: Size, *, seed: int
) -> None:
    """Train the encoder under two linear heads, drop the heads, and freeze it."""
    torch.manual_seed(seed + 10)
    device = model.device
    tower = find_tower(modality, model)
    width = size.encoder_hidden
    frames = data.NUM_FRAMES if modality == "video" else 1
    digit_head = nn.Linear(width, 10).to(device)
    attribute_head = nn.Linear(width * frames, len(tasks.ATTRIBUTES[modality])).to(device)
    digits = torch.tensor(pool.digits, device=device)
    attributes = torch.tensor(pool.attributes, device=device)
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pool.digits), (ENCODER_BATCH,), generator=generator)
        features, lengths = encode(modality, model, pool.inputs[rows], layer=-1)
        counts = torch.arange(features.shape[1], device=device)[None] < lengths[:, None]
        mean = (features * counts[..., None]).sum(1) / lengths[:, None]
        per_frame = features.unflatten(1, (frames, -1)).mean(2).flatten(1)
        rows = rows.to(device)
        digit_logits = digit_head(mean)
        attribute_logits = attribute_head(per_frame if frames > 1 else mean)
        loss = nn.functional.cross_entropy(digit_logits, digits[rows])
        loss = loss + nn.functional.cross_entropy(attribute_logits, attributes[rows])
        right = (digit_logits.argmax(-1) == digits[rows]) & (
            attribute_logits.argmax(-1) == attributes[rows]
        )
        return loss, right.float().mean()

    parameters = [p for p in tower.parameters() if p.requires_grad]
    parameters += [*digit_head.parameters(), *attribute_head.parameters()]
    fit(
        f"{modality} encoder",
        [{"params": parameters, "lr": size.encoder_rate}],
        loss_of_step,
        size.encoder_steps[modality],
    )
    freeze_encoder(modality, model, tower.state_dict())


def freeze_encoder(modality: str, model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Give the encoder these weights, as they will be saved; they stay so from here on."""
    tower = find_tower(modality, model)
    tower.load_state_dict(state)
    tower.to(torch.bfloat16).to(torch.float32).requires_grad_(False)
    if modality == "video":
        model.model.image_tower.load_state_dict(tower.state_dict())
        model.model.image_tower.requires_grad_(False)


@torch.no_grad()
def encode_pool(modality: str, model: PreTrainedModel, pool: Pool) -> None:
    """Let the frozen encoder see all sources of the pool."""
    pieces = [encode(modality, model, part) for part in pool.inputs.split(500)]
    pool.features = torch.cat([features.cpu() for features, _ in pieces])
    pool.lengths = torch.cat([lengths.cpu() for _, lengths in pieces])
