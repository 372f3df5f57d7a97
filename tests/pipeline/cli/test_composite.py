"""The commands place and generate, as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"
IMAGE, SOUND = str(SAMPLES / "image_seven_light.png"), str(SAMPLES / "sound_three_low.wav")
ASK = "which digit is in the image ?"


def test_place_shows_what_each_device_holds(lab_store: str, capsys: Any) -> None:
    code, out, _ = invoke(capsys, "place", f"{lab_store}#mmer", "--gpus", "4x80")
    assert code == 0
    assert "cuda:3" in out
    assert "by tensor, torchrun --nproc-per-node 4; 512 tokens, batch 1, policy packed" in out
    code, out, _ = invoke(
        capsys, "place", f"{lab_store}#mmer", "--gpus", "2x80", "--by", "layers", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert [device["device"] for device in found["devices"]] == ["cuda:0", "cuda:1"]
    assert found["devices"][0]["last_layer"] + 1 == found["devices"][1]["first_layer"]
    assert all(device["total"] == sum(device["memory"].values()) for device in found["devices"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpus", "1x1"],
            "PlacementError: .*does not fit .*\n.*cuda:0: 1.0\\d+ GB of 1.0000 GB, does not fit",
        ),
        (["--gpus", "1x0.001"], "cuda:0: 1.0\\d+ GB of 0.0010 GB, does not fit"),
        (["--gpus", "4x"], "'4x': expected devices as COUNTxGB, such as 4x80"),
        (["--gpus", "eight"], "'eight': expected devices as COUNTxGB, such as 4x80"),
        (
            ["--gpus", "3x80", "--by", "tensor"],
            "cannot be divided over 3 ranks; possible are 1, 2, 4",
        ),
        (["--gpus", "80", "--by", "magic"], "--by: expected 'tensor' or 'layers', got 'magic'"),
        (["--gpus", "80", "--policy", "magic"], "--policy: expected 'packed' or 'resident'"),
        (
            ["--gpus", "80", "--dtype", "int4"],
            "--dtype: expected 'bfloat16', 'float16' or 'float32'",
        ),
    ],
)
def test_place_refuses_with_the_reason(
    lab_store: str, capsys: Any, arguments: list[str], message: str
) -> None:
    code, _, err = invoke(capsys, "place", f"{lab_store}#mmer", *arguments)
    assert code == 1
    assert "Traceback" not in err
    assert re.search(message, err), err


def test_generate_streams_samples_and_spreads(lab_store: str, capsys: Any) -> None:
    uri = f"{lab_store}#mmer"
    expected = invoke(capsys, "generate", uri, ASK, "--image", IMAGE, "--max-new-tokens", "3")
    assert expected[:2] == (0, "seven\n")
    assert (
        invoke(capsys, "generate", uri, ASK, "--image", IMAGE, "--max-new-tokens", "3", "--stream")[
            1
        ].strip()
        == "seven"
    )
    drawn = ("--temperature", "3", "--seed", "4", "--max-new-tokens", "6")
    assert invoke(capsys, "generate", uri, ASK, "--image", IMAGE, *drawn) == invoke(
        capsys, "generate", uri, ASK, "--image", IMAGE, *drawn
    )
    for options in (
        ["--cache", "static"],
        ["--policy", "resident"],
        ["--gpus", "2x1", "--device", "cpu"],
        ["--dtype", "float32"],
    ):
        assert invoke(
            capsys, "generate", uri, ASK, "--image", IMAGE, "--max-new-tokens", "3", *options
        )[:2] == (0, "seven\n")


def test_generate_answers_a_file_of_prompts_of_different_layouts(
    lab_store: str, tmp_path: Path, capsys: Any
) -> None:
    prompts = [
        {"question": ASK, "image": [IMAGE]},
        {"question": "which digit is in the sound ?", "audio": SOUND, "image": [IMAGE]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n\n")
    code, out, _ = invoke(
        capsys,
        "generate",
        f"{lab_store}#mmer",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--max-new-tokens",
        "3",
    )
    assert code == 0
    assert out.splitlines() == ["seven", "three"]


@pytest.mark.parametrize(
    "arguments", [["--gpus", "2x80"], ["--gpus", "2x80", "--device", "cuda"], ["--device", "cuda"]]
)
def test_generate_on_gpus_never_runs_on_the_cpu_instead(
    lab_store: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = invoke(
        capsys, "generate", f"{lab_store}#mmer", ASK, "--image", IMAGE, *arguments
    )
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"error: PlacementError: device 'cuda(:0)?': torch finds no CUDA GPU in this process\. Take"
        r" --device cpu, .*\n",
        err,
    ), err


def test_a_rank_without_a_gpu_is_told_so_before_it_waits_for_the_others(
    lab_store: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    code, _, err = invoke(capsys, "generate", f"{lab_store}#mmer", ASK, "--gpus", "2x80")
    assert code == 1
    assert err.startswith(
        "error: PlacementError: device 'cuda:1': torch finds no CUDA GPU in this process"
    ), err


@pytest.mark.parametrize("length", [0, 60, 300])
def test_a_point_cloud_that_is_cut_short_is_one_clear_error(
    lab_store: str, tmp_path: Path, capsys: Any, length: int
) -> None:
    (tmp_path / "cut.npy").write_bytes((SAMPLES / "cloud_eight_deep.npy").read_bytes()[:length])
    code, out, err = invoke(
        capsys, "generate", f"{lab_store}#mmer", ASK, "--media", f"point={tmp_path / 'cut.npy'}"
    )
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: PromptError: {tmp_path / 'cut.npy'}: cannot be read as features ("
    ), err
    assert err.count("\n") == 1
    assert err.endswith("an array [tokens, width] saved by numpy.save\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["x ?", "--media", "smell=a.txt"],
            (
                "no expert for modality 'smell'; this composite has image (image), audio (audio),"
                " video (video)"
            ),
        ),
        (["x ?", "--image", __file__], "cannot be read as an image"),
        (
            ["x ?", "--media", "text=a.txt"],
            "--media: 'text' is no modality. Put the text into the question",
        ),
        (["what is in {image} ?"], "the question names {image} 1 times, 0 such inputs were given"),
        (["x ?", "--image", "/dev/null"], "cannot be read as an image"),
        (["x ?", "--image", "missing.png"], "missing.png: no such image file"),
        (["x ?", "--audio", __file__], "cannot be read as audio"),
        (["x ?", "--video", __file__], "cannot be read as a video"),
        (["x " * 600], "the model takes 512 together"),
        (["x ?", "--gpus", "1x0.001"], "does not fit"),
        (
            ["x ?", "--gpus", "2x80", "--device", "cuda:1"],
            "--gpus starts at cuda:0, so 'cuda:1' would have no effect",
        ),
        (["x ?", "--seed", "3"], "--seed: has no effect on greedy answers"),
        (["x ?", "--temperature", "0"], "--temperature: 0 means greedy"),
        (["x ?", "--cache", "paged"], "--cache: expected 'dynamic' or 'static', got 'paged'"),
        ([], "give a question, or an --image"),
        (["x ?", "--prompts", __file__], "questions and files come from the prompt file"),
        (["--prompts", __file__], "line 1"),
    ],
)
def test_generate_refuses_with_one_clear_error(
    lab_store: str, capsys: Any, arguments: list[str], message: str
) -> None:
    code, out, err = invoke(capsys, "generate", f"{lab_store}#mmer", *arguments)
    assert code == 1
    assert message in err.replace("\n", " ")
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not out
