"""The committed experts are what the lab says they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {
    "base": "LlamaForCausalLM",
    "image": "LlavaForConditionalGeneration",
    "audio": "Qwen2AudioForConditionalGeneration",
    "video": "VideoLlavaForConditionalGeneration",
}


@pytest.fixture
def lab_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from lab import data, evaluate, tasks

    return data, evaluate, tasks


def test_the_checkpoints_are_small_and_hold_safetensors_alone(lab_checkpoints: Path) -> None:
    files = [path for path in lab_checkpoints.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja"}
    for name, architecture in CLASSES.items():
        assert json.loads((lab_checkpoints / name / "config.json").read_text())["architectures"] == [architecture]


@pytest.mark.parametrize("part", CLASSES)
def test_each_checkpoint_answers_held_out_questions_of_every_kind(lab_modules: Any, lab_checkpoints: Path, part: str) -> None:
    _, evaluate, tasks = lab_modules
    modality = "text" if part == "base" else part
    examples = tasks.make_examples(modality, split="validation", num_examples=100, seed=5)
    scores = evaluate.score_checkpoint(modality, lab_checkpoints / part, examples)
    assert len(scores) == 5
    assert all(score > tasks.chance(task) + 0.3 for task, score in scores.items()), scores
    assert sum(scores.values()) / 5 > 0.9, scores


def test_no_handwritten_digit_and_no_speaker_is_in_two_splits(lab_modules: Any) -> None:
    data, _, _ = lab_modules
    seen: dict[bytes, str] = {}
    for split in data.SPLITS:
        for digit, pictures in data._digits_of(split).items():
            for picture in pictures:
                assert seen.setdefault(picture.tobytes() + bytes([digit]), split) == split
    speakers = [speaker for split in data.SPLITS for speaker in data._speakers_of(split)]
    assert len(set(speakers)) == len(speakers) == sum(data.NUM_SPEAKERS.values())
