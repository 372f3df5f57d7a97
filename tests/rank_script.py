"""Run by torchrun, one process per rank: load a composite together, compute, and let rank 0 write what was found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline import Part, load_composite
from mmerge.workers.composite import Composite
from mmerge.workers.ranks import open_ranks


def media(kind: str, num_tokens: int, width: int, seed: int) -> Part:
    return Part(kind, torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed)))


def make_prompts(width: int) -> list[list[Part]]:
    return [
        [Part.text("w5 w6"), media("image", 5, width, 1), media("audio", 3, width, 2), Part.text("w7 w8")],
        [media("video", 2, width, 3), Part.text("w9")],
    ]


def held_bytes(composite: Composite) -> int:
    tensors = [*composite.language_model.parameters(), *composite.language_model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def measure(uri: str, options: dict[str, Any]) -> dict[str, Any]:
    ranks = open_ranks(timeout_s=60)
    composite = load_composite(uri, ranks=ranks, dtype=torch.float32, **options)
    prompts = make_prompts(composite.language_model.config.hidden_size)
    found = {
        "logits": [composite.logits(prompt).tolist() for prompt in prompts],
        "answers": composite.generate_batch(prompts, max_new_tokens=5),
        "sampled": ranks.collect(composite.generate(prompts[0], max_new_tokens=8, do_sample=True, temperature=2.0)),
        "bytes_read": [report.bytes_read for report in composite.load_reports],
        "held_bytes": ranks.collect(held_bytes(composite)),
    }
    try:
        composite.generate([Part("image", torch.zeros(2, 3))])
    except MmergeError as error:
        found["refused"] = ranks.collect(str(error))
    if os.environ.get("DIES") == os.environ["RANK"]:
        os._exit(7)  # as a process that is killed: no word to the others
    composite.logits(prompts[0])
    ranks.close()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        result = measure(sys.argv[1], json.loads(sys.argv[3]))
    except MmergeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(result))
