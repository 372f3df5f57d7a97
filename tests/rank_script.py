"""Script for torchrun: load a composite model on all ranks, compute, write from rank 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmerge.manifests.errors import MmergeError, PromptError
from mmerge.pipeline import Part, load_composite
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.process_group import ProcessGroup, open_process_group

SAMPLES = Path(__file__).resolve().parent.parent / "examples" / "lab" / "samples"


def media(kind: str, num_tokens: int, width: int, seed: int) -> Part:
    return Part(kind, torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed)))


def make_prompts(width: int) -> list[list[Part]]:
    return [
        [
            Part.text("w5 w6"),
            media("image", 5, width, 1),
            media("audio", 3, width, 2),
            Part.text("w7 w8"),
        ],
        [media("video", 2, width, 3), Part.text("w9")],
    ]


def make_lab_prompts(composite: Composite) -> list[list[Part]]:
    image, sound = (
        Part("image", SAMPLES / "image_seven_light.png"),
        Part("audio", SAMPLES / "sound_three_low.wav"),
    )
    return [
        composite.prompt("which digit is in the image ?", [image, sound]),
        composite.prompt("which digit is in the sound ?", [sound]),
    ]


def held_bytes(composite: Composite) -> int:
    tensors = [*composite.language_model.parameters(), *composite.language_model.buffers()]
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )


def measure(group: ProcessGroup, case: dict[str, Any]) -> dict[str, Any]:
    composite = load_composite(case["uri"], group=group, dtype=torch.float32, **case["options"])
    is_lab = case["uri"].endswith("#mmer")
    prompts = (
        make_lab_prompts(composite)
        if is_lab
        else make_prompts(composite.language_model.config.hidden_size)
    )
    broken = Part("image", Path(__file__)) if is_lab else Part("image", torch.zeros(2, 3))
    results = {
        "logits": [composite.logits(prompt).tolist() for prompt in prompts],
        "answers": composite.generate_batch(prompts, max_new_tokens=5),
        "sampled": group.all_gather_object(
            composite.generate(prompts[0], max_new_tokens=8, do_sample=True, temperature=2.0)
        ),
        "bytes_read": [report.bytes_read for report in composite.load_reports],
        "held_bytes": group.all_gather_object(held_bytes(composite)),
    }
    try:
        composite.generate([broken])
    except PromptError as error:
        results["refused"] = group.all_gather_object(str(error))
    if os.environ.get("DIES") == os.environ["RANK"]:
        os._exit(7)  # like a killed process: the other ranks get no message
    composite.logits(prompts[0])
    return results


def gloo_threads() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name or "tcpstore" in name]


def main(cases: list[dict[str, Any]], target: Path) -> None:
    group = open_process_group(timeout_s=60)
    results = [measure(group, case) for case in cases]
    if group.rank == 0:
        target.write_text(json.dumps(results))
    group.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(json.loads(sys.argv[1]), Path(sys.argv[2]))
    except MmergeError as error:
        sys.exit(str(error))
    if left := gloo_threads():
        sys.exit(
            "threads of the exchange are left when it is closed, and can abort the process at its"
            f" exit: {left}"
        )
