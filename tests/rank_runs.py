"""Composites loaded by several gloo ranks, and compared with what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rank_script import held_bytes, make_lab_prompts, make_prompts

from mmerge.pipeline import load_composite

SCRIPT = Path(__file__).resolve().parent / "rank_script.py"


def start(cases: list[dict[str, Any]], folder: Path, num_ranks: int) -> tuple[int, str]:
    """Start ranks with torchrun; return the exit code and what they printed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
        str(SCRIPT),
        json.dumps(cases),
        str(folder / "found.json"),
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=variables
    )
    return done.returncode, done.stderr


def case(uri: str, **options: Any) -> dict[str, Any]:
    return {"uri": uri, "options": options}


def check(measured: dict[str, Any], run: dict[str, Any], num_ranks: int) -> None:
    composite = load_composite(run["uri"], dtype=torch.float32, **run["options"])
    is_lab = run["uri"].endswith("#mmer")
    prompts = (
        make_lab_prompts(composite)
        if is_lab
        else make_prompts(composite.language_model.config.hidden_size)
    )
    for logits, prompt in zip(measured["logits"], prompts, strict=True):
        # Sums over ranks are added in another order than within one matrix: float32, for logits of
        # about 1.
        torch.testing.assert_close(
            torch.tensor(logits),
            composite.logits(prompt),
            rtol=1e-4 if is_lab else 1e-5,
            atol=1e-4 if is_lab else 1e-5,
        )
    assert measured["answers"] == composite.generate_batch(prompts, max_new_tokens=5)
    assert len(set(measured["sampled"])) == 1, "ranks drew different tokens"
    assert len(measured["refused"]) == num_ranks
    assert len(set(measured["refused"])) == 1
    assert ("cannot be read as an image" if is_lab else "width 3") in measured["refused"][0]
    alone = composite.load_reports[0].bytes_read
    if composite.manifest.kind == "masks":
        assert sum(measured["bytes_read"]) == alone, "a byte was read twice, or not at all"
        assert max(measured["bytes_read"]) < 1.15 * alone / num_ranks
    # Norms are whole on every rank, and with more ranks than key-value heads each head is held
    # twice.
    assert max(measured["held_bytes"]) < 1.25 * held_bytes(composite) / num_ranks


def run_and_check(cases: list[dict[str, Any]], folder: Path, num_ranks: int) -> None:
    code, printed = start(cases, folder, num_ranks)
    assert code == 0, printed
    for measured, run in zip(json.loads((folder / "found.json").read_text()), cases, strict=True):
        check(measured, run, num_ranks)
