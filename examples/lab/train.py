"""Train the lab from scratch: base, four experts, two new tasks, LoRA twins.

    python examples/lab/train.py [--out DIR] [--seed 0] [--device auto] [--only PART ...]
    [--keep-encoders]

writes DIR/{base,image,audio,video,point,image_new,audio_new} in the Hugging Face layout and
DIR/twins/… as adapters of PEFT, all in bfloat16. LAB_SIZE=large trains larger ones, for a GPU, into
build/lab-large.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import models, tasks
from lab.batches import Collator, embed, find_parts
from lab.checks import check_all
from lab.evaluate import load_checkpoint
from lab.fitting import (
    answer_loss,
    fit,
    make_expert_prompt,
    make_new_prompt,
    make_text_prompt,
    save,
    stream_batches,
)
from lab.pools import encode_pool, find_tower, freeze_encoder, make_pool, train_encoder
from lab.sizes import Size, read_size
from lab.twins import train_twin

HERE = Path(__file__).resolve().parent
NEW = {f"{modality}_new": modality for modality in tasks.NEW_QUESTIONS}
TWINS = {f"twins/{modality}": modality for modality in tasks.MODALITIES}
PARTS = ("base", *tasks.MODALITIES, *NEW, *TWINS)


def train_base(out: Path, size: Size, *, seed: int, device: torch.device) -> None:
    """Train the base on prompts in which every input is described in words.

    Core questions come first, then all.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    tokenizer = models.build_tokenizer()
    model = models.build_base(tokenizer, size).to(device)
    collate = Collator(tokenizer.get_vocab(), None, None)
    make = partial(make_text_prompt, rng, questions=tasks.CORE_QUESTIONS)
    batches = stream_batches(make, collate, rng=rng, batch_size=size.batch)

    # A small model learns slowly which input a word belongs to. A temporary linear head teaches
    # the first layer; without it the accuracy stays near 0.5 for thousands of steps.
    source_head = nn.Linear(model.config.hidden_size, len(tasks.MODALITIES)).to(device)
    first_layer: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda module, args, output: first_layer.append(output)
    )

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        first_layer.clear()
        embeddings = model.model.embed_tokens(batch.ids.to(device))
        loss, accuracy = answer_loss(
            model.model, model.lm_head, embeddings, batch, end_id=tokenizer.eos_token_id
        )
        labels = _source_labels(batch.ids, tokenizer.get_vocab()).to(device)
        logits = source_head(first_layer[0])
        return (
            loss + 0.5 * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
            accuracy,
        )

    parameters = [*model.parameters(), *source_head.parameters()]
    fit("base", [{"params": parameters, "lr": size.base_rate}], loss_of_step, size.base_steps)
    hook.remove()
    save(model, out / "base")
    tokenizer.save_pretrained(out / "base")
    _train_base_on_all(out, size, seed=seed, device=device)


def _train_base_on_all(out: Path, size: Size, *, seed: int, device: torch.device) -> None:
    """Train the base further, on all questions that a prompt in words can ask."""
    model, tokenizer = load_checkpoint("base", out / "base")
    model = model.to(device)
    rng = np.random.default_rng([seed, 6])
    collate = Collator(tokenizer.get_vocab(), None, None)
    batches = stream_batches(
        partial(make_text_prompt, rng), collate, rng=rng, batch_size=size.batch
    )

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        embeddings = model.model.embed_tokens(batch.ids.to(device))
        return answer_loss(
            model.model, model.lm_head, embeddings, batch, end_id=tokenizer.eos_token_id
        )

    fit(
        "base, all questions",
        [{"params": list(model.parameters()), "lr": size.whole_rate}],
        loss_of_step,
        size.whole_steps,
    )
    save(model, out / "base")
    tokenizer.save_pretrained(out / "base")


def _source_labels(ids: Tensor, word_ids: dict[str, int]) -> Tensor:
    """Return for each token [rows, length] the input that was named last before it.

    -100 where none was, in its own question or before.
    """
    words = torch.tensor([word_ids[word] for word in tasks.SOURCE_WORDS.values()])
    is_word = ids[..., None] == words
    places = torch.arange(ids.shape[1]).expand_as(ids)
    latest = torch.where(is_word.any(-1), places, 0).cummax(1).values
    labels = is_word.float().argmax(-1).gather(1, latest)
    question = torch.where(ids == word_ids["question"], places, 0).cummax(1).values
    return labels.masked_fill((latest == 0) | (question > latest), -100)


def train_expert(
    modality: str, out: Path, size: Size, *, seed: int, device: torch.device, keep_encoder: bool
) -> None:
    """Tune an encoder, then the connector and the whole language model, on one modality.

    With `keep_encoder` the encoder is that of the checkpoint in `out`.
    """
    torch.manual_seed(seed + 1)
    rng = np.random.default_rng([seed, 3, tasks.MODALITIES.index(modality)])
    model, tokenizer = models.build_expert(modality, out / "base", size)
    model = model.to(device)
    preprocessor = models.build_preprocessor(modality)
    pool = make_pool(modality, preprocessor, pool_size=size.pool, seed=seed)
    if keep_encoder:
        freeze_encoder(
            modality,
            model,
            find_tower(modality, load_checkpoint(modality, out / modality)[0]).state_dict(),
        )
    else:
        train_encoder(modality, model, pool, size, seed=seed)
    encode_pool(modality, model, pool)
    collate = Collator(tokenizer.get_vocab(), modality, pool)
    batches = stream_batches(
        lambda: make_expert_prompt(modality, rng), collate, rng=rng, batch_size=size.expert_batch
    )
    assert pool.features is not None
    pool_features, pool_lengths = pool.features, pool.lengths
    language_model, head, connector = find_parts(model)
    assert connector is not None

    # The direction of a video depends on several of its tokens. A temporary linear head predicts
    # it from the second layer at the video's last token; without it, accuracy stays near chance.
    torch.manual_seed(seed + 11)
    attribute_head = nn.Linear(
        model.config.get_text_config().hidden_size, len(tasks.ATTRIBUTES[modality])
    ).to(device)
    attributes = torch.tensor(pool.attributes)
    second_layer: list[Tensor] = []
    hook = language_model.layers[1].register_forward_hook(
        lambda module, args, output: second_layer.append(output)
    )

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        second_layer.clear()
        embeddings = embed(
            model, batch, pool_features[batch.pool_rows], pool_lengths[batch.pool_rows]
        )
        loss, accuracy = answer_loss(
            language_model, head, embeddings, batch, end_id=tokenizer.eos_token_id
        )
        rows, last = batch.media.any(1), (batch.media * torch.arange(batch.media.shape[1])).amax(1)
        if rows.any():
            logits = attribute_head(second_layer[0][rows.nonzero()[:, 0], last[rows]])
            loss = loss + 0.3 * nn.functional.cross_entropy(
                logits, attributes[batch.pool_rows].to(device)
            )
        return loss, accuracy

    fit(
        f"{modality} expert",
        [
            {
                "params": [*language_model.parameters(), *head.parameters()],
                "lr": size.expert_rate[modality],
                "weight_decay": 0.0,
            },
            # the connector is tuned faster, so that the language model changes little
            {
                "params": [*connector.parameters(), *attribute_head.parameters()],
                "lr": size.connector_rate,
            },
        ],
        loss_of_step,
        size.expert_steps[modality],
    )
    hook.remove()
    save(model, out / modality)
    models.save_preprocessor(modality, tokenizer, preprocessor, out / modality)


def train_new(part: str, out: Path, size: Size, *, seed: int, device: torch.device) -> None:
    """Tune an expert further on its new task only, which makes it forget others."""
    modality = NEW[part]
    torch.manual_seed(seed + 2)
    rng = np.random.default_rng([seed, 4, tasks.MODALITIES.index(modality)])
    model, tokenizer = load_checkpoint(modality, out / modality)
    model = model.to(device)
    find_tower(modality, model).requires_grad_(False)
    preprocessor = models.build_preprocessor(modality)
    pool = make_pool(modality, preprocessor, pool_size=size.pool // 4, seed=seed)
    encode_pool(modality, model, pool)
    collate = Collator(tokenizer.get_vocab(), modality, pool)
    batches = stream_batches(
        lambda: make_new_prompt(modality, rng), collate, rng=rng, batch_size=size.expert_batch
    )
    assert pool.features is not None
    pool_features, pool_lengths = pool.features, pool.lengths
    language_model, head, connector = find_parts(model)
    assert connector is not None

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        embeddings = embed(
            model, batch, pool_features[batch.pool_rows], pool_lengths[batch.pool_rows]
        )
        return answer_loss(language_model, head, embeddings, batch, end_id=tokenizer.eos_token_id)

    parameters = [*language_model.parameters(), *head.parameters(), *connector.parameters()]
    fit(
        f"{part}",
        [{"params": parameters, "lr": size.new_rate, "weight_decay": 0.0}],
        loss_of_step,
        size.new_steps,
    )
    save(model, out / part)
    models.save_preprocessor(modality, tokenizer, preprocessor, out / part)


def main() -> None:
    """Train everything, check that it loads again and print the accuracies."""
    name, size = read_size()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    committed = HERE / "checkpoints"
    parser.add_argument(
        "--out",
        type=Path,
        default=committed if name == "small" else HERE.parent.parent / "build" / f"lab-{name}",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="train these alone")
    parser.add_argument(
        "--keep-encoders", action="store_true", help="take the encoders from the checkpoints in DIR"
    )
    args = parser.parse_args()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    begin = time.time()
    for part in args.only:
        if part == "base":
            train_base(args.out, size, seed=args.seed, device=device)
        elif part in NEW:
            train_new(part, args.out, size, seed=args.seed, device=device)
        elif part in TWINS:
            train_twin(TWINS[part], args.out, size, seed=args.seed, device=device)
        else:
            train_expert(
                part, args.out, size, seed=args.seed, device=device, keep_encoder=args.keep_encoders
            )
    print(f"trained in {time.time() - begin:.0f} s")
    check_all(args.only, args.out, split="test", num_examples=540)


if __name__ == "__main__":
    main()
