"""Several gloo ranks hold one composite and give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_adapters, build_masks
from rank_script import held_bytes, make_prompts

from mmerge.manifests.errors import PlacementError
from mmerge.pipeline import load_composite
from mmerge.workers.composite import Composite
from mmerge.workers.division import Division
from mmerge.workers.placement import plan_placement
from mmerge.workers.reader import BuildReader

SCRIPT = Path(__file__).resolve().parent.parent / "rank_script.py"


def start(uri: str, folder: Path, num_ranks: int, *, environment: dict[str, str] | None = None, **options: Any) -> tuple[int, str, float]:
    """Start ranks as torchrun does; return the exit code, what they printed, and the seconds it took."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(SCRIPT), uri,
        str(folder / "found.json"), json.dumps(options),
    ]  # fmt: skip
    began = time.monotonic()
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=variables)
    return done.returncode, done.stderr, time.monotonic() - began


def check(folder: Path, composite: Composite) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    prompts = make_prompts(composite.language_model.config.hidden_size)
    for logits, prompt in zip(found["logits"], prompts, strict=True):
        # Sums over ranks are added in another order than within one matrix: float32, relative to logits of about 1.
        torch.testing.assert_close(torch.tensor(logits), composite.logits(prompt), rtol=1e-5, atol=1e-5)
    assert found["answers"] == composite.generate_batch(prompts, max_new_tokens=5)
    assert len(set(found["sampled"])) == 1, "ranks drew different tokens"
    assert len(set(found["refused"])) == 1
    assert "features" in found["refused"][0] or "width 3" in found["refused"][0]
    return found


@pytest.mark.parametrize(("architecture", "num_ranks", "policy"), [("llama", 2, "packed"), ("qwen2", 4, "packed"), ("qwen3", 2, "resident")])
def test_ranks_give_the_logits_of_one_process_and_share_bytes_and_memory(
    tmp_path: Path, architecture: str, num_ranks: int, policy: Any
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 42}
    uri = build_masks(tmp_path, architecture, **sizes)
    code, printed, _ = start(uri, tmp_path, num_ranks, policy=policy)
    assert code == 0, printed
    composite = load_composite(uri, dtype=torch.float32, policy=policy)
    found = check(tmp_path, composite)
    alone = composite.load_reports[0].bytes_read
    assert sum(found["bytes_read"]) == alone, "a byte was read twice, or not at all"
    assert max(found["bytes_read"]) < 1.15 * alone / num_ranks
    # With 4 ranks each of the 2 key-value heads is held twice; norms are whole everywhere.
    assert max(found["held_bytes"]) < 1.2 * held_bytes(composite) / num_ranks


def test_adapters_are_divided_too(tmp_path: Path) -> None:
    uri = build_adapters(tmp_path, "llama")
    code, printed, _ = start(uri, tmp_path, 2)
    assert code == 0, printed
    check(tmp_path, load_composite(uri, dtype=torch.float32))


def test_the_trained_experts_answer_the_same_on_four_ranks(lab_store: str, tmp_path: Path) -> None:
    uri = f"{lab_store}#mmer"
    code, printed, _ = start(uri, tmp_path, 2, mode="retention", expert="image")
    assert code == 1
    assert "PromptError" in printed  # these prompts are features, the expert wants an image: every rank says so, none waits


def test_a_rank_that_dies_is_one_clear_error_and_no_hang(tmp_path: Path) -> None:
    uri = build_masks(tmp_path, "llama")
    code, printed, seconds = start(uri, tmp_path, 2, environment={"DIES": "1"})
    assert code != 0
    assert "RankLost: rank 0 of 2: another rank of this composite ended or did not answer" in printed or "exitcode  : 7" in printed
    assert seconds < 60
    assert not (tmp_path / "found.json").exists()


def test_a_damaged_object_ends_all_ranks(tmp_path: Path) -> None:
    uri = build_masks(tmp_path, "llama")
    entry = next(entry for entry in BuildReader(uri).manifest.entries if entry.role == "merge" and entry.shard == "layers.1")
    path = tmp_path / "store" / entry.key
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    code, printed, seconds = start(uri, tmp_path, 2)
    assert code != 0
    assert f"{entry.key}: model.layers.1." in printed
    assert seconds < 60


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused_with_those_that_do(lab_store: str) -> None:
    config = load_composite(f"{lab_store}#mmer").language_model.config
    with pytest.raises(PlacementError, match=r"4 heads, 2 key-value heads and an MLP of 256 cannot be divided over 3 ranks; possible are 1, 2, 4"):
        Division.of(config, num_ranks=3)
    placement = plan_placement(f"{lab_store}#mmer", devices=[10**9] * 2, by="tensor", device_type="cpu")
    with pytest.raises(PlacementError, match="this process is alone: start it with 'torchrun --nproc-per-node 2'"):
        load_composite(f"{lab_store}#mmer", placement=placement)
