"""Several gloo ranks hold one composite and give what one process gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import build_adapters, build_masks
from rank_runs import SCRIPT, case, run_and_check

from mmerge.manifests.errors import PlacementError
from mmerge.pipeline import load_composite
from mmerge.workers.composite.placement_planner import plan_placement
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.families.llama import LLAMA
from mmerge.workers.reconstruction.build_reader import BuildReader

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def test_two_ranks_give_what_one_process_gives_and_share_bytes_and_memory(
    tmp_path: Path, lab_store: str
) -> None:
    places = {name: tmp_path / name for name in ("llama", "qwen3", "damc")}
    for place in places.values():
        place.mkdir()
    cases = [
        case(build_masks(places["llama"], "llama", **SIZES)),
        case(build_masks(places["qwen3"], "qwen3", **SIZES), policy="resident"),
        case(build_adapters(places["damc"], "llama")),
        case(f"{lab_store}#mmer"),
    ]
    run_and_check(cases, tmp_path, 2)


def test_four_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    run_and_check([case(build_masks(tmp_path, "qwen2", **SIZES))], tmp_path, 4)


def start_alone(
    cases: list[dict[str, Any]], folder: Path, num_ranks: int, **environment: str
) -> list[tuple[int, str]]:
    """Start ranks with nobody who ends them when one fails; return each one's exit code and what it
    printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), json.dumps(cases), str(folder / "found.json")]
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]
    return [
        (rank.returncode, printed)
        for rank in ranks
        for printed in [rank.communicate(timeout=120)[1]]
    ]


def test_a_rank_that_dies_is_one_clear_error_on_the_others_and_no_hang(tmp_path: Path) -> None:
    uri = build_masks(tmp_path, "llama")
    (code, printed), (dead, _) = start_alone([case(uri)], tmp_path, 2, DIES="1")
    assert (code, dead) == (1, 7)
    message = printed.strip().splitlines()[-1]
    assert message.startswith(
        "RankLost: rank 0 of 2: another rank of this composite ended or did not answer ("
    )
    assert message.endswith("Its own message says why; start all ranks again")
    assert "Traceback" not in printed
    assert not (tmp_path / "found.json").exists()


def test_a_damaged_object_ends_all_ranks_and_one_names_it(tmp_path: Path) -> None:
    uri = build_masks(tmp_path, "llama")
    entry = next(
        entry
        for entry in BuildReader(uri).manifest.entries
        if entry.role == "merge" and entry.shard == "layers.1"
    )
    path = tmp_path / "store" / entry.key
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    ended = start_alone([case(uri)], tmp_path, 2)
    assert [code for code, _ in ended] == [1, 1]
    kinds = sorted(printed.strip().splitlines()[-1].partition(":")[0] for _, printed in ended)
    assert kinds == ["DamagedObject", "RankLost"]
    assert any(f"{entry.key}: model.layers.1." in printed for _, printed in ended)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused_with_those_that_do(
    lab_store: str,
) -> None:
    config = load_composite(f"{lab_store}#mmer").language_model.config
    with pytest.raises(
        PlacementError,
        match=(
            r"4 heads, 2 key-value heads and an MLP of 256 cannot be divided over 3 ranks; possible"
            r" are 1, 2, 4"
        ),
    ):
        TensorParallelPlan.from_config(config, family=LLAMA, num_ranks=3)
    placement = plan_placement(
        f"{lab_store}#mmer", devices=[10**9] * 2, by="tensor", device_type="cpu"
    )
    with pytest.raises(
        PlacementError, match="this process is alone: start it with 'torchrun --nproc-per-node 2'"
    ):
        load_composite(f"{lab_store}#mmer", placement=placement)
