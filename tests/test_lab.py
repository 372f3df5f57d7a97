"""The committed experts are what the lab says they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmerge.manifests.errors import PromptError
from mmerge.pipeline import Part, export, load_composite, make_plan, read_recipe, run
from mmerge.workers.modalities import encoders

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {
    "base": "LlamaForCausalLM",
    "image": "LlavaForConditionalGeneration",
    "audio": "Qwen2AudioForConditionalGeneration",
    "video": "VideoLlavaForConditionalGeneration",
    "point": "PointLlamaForCausalLM",
    "image_new": "LlavaForConditionalGeneration",
    "audio_new": "Qwen2AudioForConditionalGeneration",
}
ALL_FOUR = ("image", "audio", "video", "point")


class Modules:
    """The lab's modules."""

    def __init__(self) -> None:
        from lab import data, evaluate, points, prompts, tasks, twins

        self.data, self.evaluate, self.points, self.prompts, self.tasks, self.twins = (
            data,
            evaluate,
            points,
            prompts,
            tasks,
            twins,
        )


@pytest.fixture
def lab_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return Modules()


@pytest.fixture
def registered(lab_modules: Any) -> Iterator[None]:
    lab_modules.points.register()
    yield
    encoders._makers.clear()


def build(recipe: str, folder: Path) -> str:
    """Build one of the lab's recipes into a store of its own."""
    read = replace(
        read_recipe(ROOT / "examples" / "lab" / "recipes" / f"{recipe}.yaml"),
        output=str(folder / "store"),
    )
    run(make_plan(read))
    return f"{folder}/store#{recipe}"


def above_chance(tasks: Any, scores: dict[str, float]) -> dict[str, float]:
    """For each task the share of the way from blind guessing to no error."""
    return {
        task: (score - tasks.chance(task)) / (1 - tasks.chance(task))
        for task, score in scores.items()
    }


def test_the_checkpoints_are_small_and_hold_safetensors_alone(lab_checkpoints: Path) -> None:
    files = [path for path in lab_checkpoints.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja"}
    for name, architecture in CLASSES.items():
        assert json.loads((lab_checkpoints / name / "config.json").read_text())[
            "architectures"
        ] == [architecture]


@pytest.mark.parametrize("part", ["base", *ALL_FOUR])
def test_each_checkpoint_answers_held_out_questions_of_every_kind(
    lab_modules: Any, lab_checkpoints: Path, part: str
) -> None:
    tasks = lab_modules.tasks
    modality = "text" if part == "base" else part
    examples = tasks.make_examples(modality, split="validation", num_examples=270, seed=5)
    scores = lab_modules.evaluate.score_checkpoint(modality, lab_checkpoints / part, examples)
    assert len(scores) == (10 if part == "base" else 9)
    assert all(share > 0.25 for share in above_chance(tasks, scores).values()), scores
    assert sum(scores.values()) / len(scores) > 0.85, scores


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_new_task_is_known_to_the_expert_that_learned_it_alone(
    lab_modules: Any, lab_checkpoints: Path, modality: str
) -> None:
    kinds = [lab_modules.tasks.NEW_QUESTIONS[modality]]
    examples = lab_modules.tasks.make_examples(
        modality, split="validation", num_examples=60, seed=5, kinds=kinds
    )
    (old,) = lab_modules.evaluate.score_checkpoint(
        modality, lab_checkpoints / modality, examples
    ).values()
    (new,) = lab_modules.evaluate.score_checkpoint(
        modality, lab_checkpoints / f"{modality}_new", examples
    ).values()
    assert new > 0.75
    assert old < 0.4


@pytest.mark.parametrize("modality", ALL_FOUR)
def test_a_twin_answers_as_well_in_the_composite_of_twins_as_it_was_tuned(
    lab_modules: Any, lab_checkpoints: Path, damc: str, modality: str
) -> None:
    examples = lab_modules.tasks.make_examples(
        modality, split="validation", num_examples=90, seed=5
    )
    scores = lab_modules.twins.score_twin(modality, lab_checkpoints, examples)
    assert sum(scores.values()) / len(scores) > 0.8, scores
    composite = load_composite(damc, mode="retention", expert=modality)
    prompts = [lab_modules.twins.with_features(example.parts) for example in examples]
    answers = composite.generate_batch(prompts, max_new_tokens=lab_modules.evaluate.MAX_NEW_TOKENS)
    right = np.mean(
        [answer == example.answer for answer, example in zip(answers, examples, strict=True)]
    )
    assert abs(right - np.mean(list(scores.values()))) < 0.05


@pytest.fixture(scope="module")
def damc(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build("damc", tmp_path_factory.mktemp("damc"))


def test_a_registered_encoder_gives_what_the_point_expert_was_trained_with(
    lab_modules: Any, registered: None, lab_checkpoints: Path, lab_store: str, tmp_path: Path
) -> None:
    cloud = lab_modules.data.draw_cloud(3, "deep", split="test", rng=np.random.default_rng(1))
    composite = load_composite(f"{lab_store}#mmer", dtype=torch.float32)
    model, _ = lab_modules.evaluate.load_checkpoint("point", lab_checkpoints / "point")
    with torch.inference_mode():
        expected = model.modal_projectors["point"](
            model.point_encoder(torch.from_numpy(cloud)[None])
        )[0]
    torch.testing.assert_close(
        composite.encoders["point"].encode(Part("point", cloud)), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(
        PromptError, match=r"a point cloud has shape \(128, 2\); give at least 32 points"
    ):
        composite.encoders["point"].encode(Part("point", cloud[:, :2]))
    np.save(tmp_path / "cut.npy", cloud)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    with pytest.raises(
        PromptError,
        match=(
            r"cut.npy: cannot be read as a point cloud \(.*\)\. Give an array \[points, 3\] saved"
            r" by numpy.save$"
        ),
    ):
        composite.encoders["point"].encode(Part("point", tmp_path / "cut.npy"))


def test_without_a_registered_encoder_the_point_expert_takes_features(
    lab_modules: Any, lab_store: str
) -> None:
    composite = load_composite(f"{lab_store}#mmer", mode="retention", expert="point")
    examples = lab_modules.tasks.make_examples("point", split="test", num_examples=45, seed=3)
    prompts = [lab_modules.twins.with_features(example.parts) for example in examples]
    answers = composite.generate_batch(prompts, max_new_tokens=lab_modules.evaluate.MAX_NEW_TOKENS)
    assert (
        np.mean(
            [answer == example.answer for answer, example in zip(answers, examples, strict=True)]
        )
        > 0.8
    )


def test_a_prompt_with_four_media_is_answered_better_by_the_composite_than_by_any_expert(
    lab_modules: Any, registered: None, lab_store: str
) -> None:
    tasks, evaluate = lab_modules.tasks, lab_modules.evaluate
    examples = tasks.make_mixed_examples(
        ALL_FOUR, split="test", num_examples=50, seed=3, kinds=[tasks.SHARE]
    )
    assert all(example.options == tasks.SHARE_OPTIONS for example in examples)
    together = evaluate.mixed_accuracy(load_composite(f"{lab_store}#mmer"), examples)
    for modality in ALL_FOUR:
        expert = load_composite(f"{lab_store}#mmer", mode="retention", expert=modality)
        assert evaluate.mixed_accuracy(expert, examples, only=modality) < together


def test_the_rebuilt_point_expert_is_a_checkpoint_of_its_own_class(
    lab_modules: Any, lab_store: str, tmp_path: Path
) -> None:
    export(f"{lab_store}#mmer", tmp_path / "export", expert="point")
    examples = lab_modules.tasks.make_examples("point", split="test", num_examples=90, seed=3)
    scores = lab_modules.evaluate.score_checkpoint("point", tmp_path / "export", examples)
    assert sum(scores.values()) / len(scores) > 0.85


def test_what_all_digits_share_is_one_thing_and_no_source_tells_it_alone(lab_modules: Any) -> None:
    tasks = lab_modules.tasks
    rng = np.random.default_rng(2)
    for count in (2, 3, 4) * 50:
        digits = [int(digit) for digit in tasks._draw_sharing(count, rng)]
        shared = [
            option
            for option in tasks.SHARE_OPTIONS
            if all(tasks._is(option, digit) for digit in digits)
        ]
        assert len(shared) == 1
        assert all(
            sum(tasks._is(option, digit) for option in tasks.SHARE_OPTIONS) == 2 for digit in digits
        )


def test_examples_are_the_same_for_a_seed_and_others_for_another(lab_modules: Any) -> None:
    def texts(seed: int) -> list[str]:
        examples = lab_modules.tasks.make_mixed_examples(
            ("image", "point"), split="test", num_examples=20, seed=seed
        )
        return [
            " ".join(part.value for part in example.parts if part.kind == "text") + example.answer
            for example in examples
        ]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_prompts_written_as_files_are_read_as_the_same_media(
    lab_modules: Any, tmp_path: Path
) -> None:
    from mmerge.workers.modalities.media_files import read_audio, read_image, read_video

    (example,) = lab_modules.tasks.make_mixed_examples(
        ALL_FOUR, split="test", num_examples=1, seed=1
    )
    (line,) = (
        lab_modules.prompts.write_prompts(tmp_path, "mixed", [example]).read_text().splitlines()
    )
    row = json.loads(line)
    assert (row["task"], row["answer"]) == (example.task, example.answer)
    kinds = [next(iter(part)) for part in row["parts"]]
    assert kinds == [part.kind for part in example.parts]
    files = {
        kind: tmp_path / part[kind]
        for kind, part in zip(kinds, row["parts"], strict=True)
        if kind != "text"
    }
    values = {part.kind: part.value for part in example.parts}
    assert np.array_equal(np.asarray(read_image(files["image"])), np.asarray(values["image"]))
    assert np.array_equal(np.load(files["point"]), values["point"])
    assert (
        np.abs(
            read_audio(files["audio"], sampling_rate=lab_modules.data.SAMPLE_RATE) - values["audio"]
        ).max()
        < 1e-4
    )
    assert np.array_equal(read_video(files["video"]), values["video"])


def test_no_handwritten_digit_and_no_speaker_is_in_two_splits(lab_modules: Any) -> None:
    data = lab_modules.data
    seen: dict[bytes, str] = {}
    for split in data.SPLITS:
        for digit, pictures in data._digits_of(split).items():
            for picture in pictures:
                assert seen.setdefault(picture.tobytes() + bytes([digit]), split) == split
    speakers = [speaker for split in data.SPLITS for speaker in data._speakers_of(split)]
    assert len(set(speakers)) == len(speakers) == sum(data.NUM_SPEAKERS.values())


def test_every_kind_of_part_is_trained_written_and_loaded_again(
    lab_modules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lab import sizes, train

    few = dict.fromkeys(ALL_FOUR, 2)
    tiny = replace(
        sizes.SIZES["small"],
        batch=4,
        base_steps=2,
        encoder_steps=few,
        expert_steps=few,
        new_steps=2,
        twin_steps=few,
        pool=1600,
    )
    monkeypatch.setattr(train, "read_size", lambda: ("small", tiny))
    parts = ["base", "image", "point", "image_new", "twins/image"]
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--out", str(tmp_path), "--device", "cpu", "--only", *parts]
    )
    train.main()
    said = capsys.readouterr().out
    assert all(f"{part}: test accuracy" in said for part in parts)
    old, new = (
        lab_modules.evaluate.load_checkpoint("image", tmp_path / part)[0].state_dict()
        for part in ("image", "image_new")
    )
    changed = {name for name in old if not old[name].equal(new[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_an_unknown_size_is_refused(lab_modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab import sizes

    monkeypatch.setenv("LAB_SIZE", "huge")
    with pytest.raises(SystemExit, match="LAB_SIZE is 'huge'; choose one of small, large"):
        sizes.read_size()
