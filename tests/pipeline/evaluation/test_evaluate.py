"""The commands evaluate and calibrate on the lab's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from command_line import invoke

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import Recipe, load_composite, parse_recipe, read_recipe
from mmerge.pipeline.evaluation.answer_tasks import Settings
from mmerge.pipeline.evaluation.calibrate import Agreement, Point, calibrate, choose
from mmerge.pipeline.evaluation.questions import Question, read_questions
from mmerge.pipeline.evaluation.targets import Asking, ask_experts
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress

LAB = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab"
SAMPLES = LAB / "samples"
QUESTIONS = (
    {
        "id": "1",
        "task": "image/digit",
        "question": "which digit is in the image ?",
        "image": "image_seven_light.png",
        "answer": "seven",
    },
    {
        "id": "2",
        "task": "image/ink",
        "question": "which ink is in the image ?",
        "image": "image_four_dark.png",
        "answer": "dark",
    },
)
OTHERS = (
    {
        "id": "3",
        "task": "audio/digit",
        "question": "which digit is in the sound ?",
        "audio": "sound_three_low.wav",
        "answer": "three",
    },
    {
        "id": "4",
        "task": "video/way",
        "question": "which direction is in the video ?",
        "video": "video_two_up.gif",
        "answer": "up",
    },
)


def write(folder: Path, *rows: Any) -> str:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_evaluate_scores_an_original_and_its_rebuilt_expert(
    lab_store: str, tmp_path: Path, capsys: Any, caplog: Any, executor: str
) -> None:
    arguments = [
        "evaluate",
        f"image={LAB / 'checkpoints' / 'image'},modality=image",
        f"rebuilt={lab_store}#mmer,expert=image",
        "--base",
        str(LAB / "checkpoints" / "base"),
        "--original",
        "image",
        "--prompts",
        write(tmp_path, *QUESTIONS),
        "--media",
        str(SAMPLES),
        "--to",
        str(tmp_path / "out"),
        "--executor",
        executor,
        "--workers",
        "1",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    code, out, err = invoke(capsys, *arguments)
    assert code == 0, err
    scores = {(row["model"], row["task"]): row for row in json.loads(out)}
    assert scores[("image", "image/digit")]["score"] == 1.0
    assert (
        scores[("rebuilt", "image/digit")]["performance_retention"]
        == scores[("rebuilt", "image/digit")]["score"]
    )
    table = pq.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert [(row["model"], row["id"]) for row in table] == [
        ("image", "1"),
        ("image", "2"),
        ("rebuilt", "1"),
        ("rebuilt", "2"),
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| image/digit | exact | 1 |" in report
    assert "Performance retention" in report
    assert (tmp_path / "out" / "retention.png").stat().st_size > 1000
    if executor == "serial":
        _, again, _ = invoke(capsys, *arguments)
        assert "answer: 2 shards, 2 there already" in caplog.text
        assert again == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{store}#mmer"], "--prompts: give a file of questions, or --mcub"),
        (
            ["{store}#mmer", "--prompts", "{q}", "--answers", "x.json"],
            "--answers: has no effect without --mcub",
        ),
        (
            ["{store}#mmer", "--prompts", "{q}", "--original", "x"],
            "--original: there is no model 'x'; there are mmer",
        ),
        (
            ["{store}#mmer,modality=image", "--prompts", "{q}"],
            "'modality' has no effect on a composite",
        ),
        (["{store}#mmer,colour=red", "--prompts", "{q}"], "expected expert=NAME or modality=NAME"),
        (["{store}#mmer", "{store}#mmer", "--prompts", "{q}"], "two models are called 'mmer'"),
        (
            [f"{LAB}/checkpoints/image,modality=image", "--prompts", "{q}"],
            "give its base LLM with --base",
        ),
        (
            ["{store}#mmer", "--prompts", "{q}", "--executor", "magic"],
            "--executor: expected 'ray', 'processes' or 'serial'",
        ),
        (
            ["{store}#mmer", "--prompts", "nowhere.jsonl"],
            "nowhere.jsonl: cannot be read (No such file or directory)",
        ),
        (
            ["{store}#mmer,expert=audio", "--prompts", "{q}"],
            "model 'mmer-audio' does not read 'image'; it reads audio",
        ),
        (
            ["{store}#mmer", "--prompts", "{q}", "--device", "gpu"],
            "--device: expected 'cpu' or 'cuda', got 'gpu'",
        ),
        (
            ["{store}#mmer", "--prompts", "{q}", "--media", "."],
            "image_seven_light.png: no such file. Name the folder of the media",
        ),
    ],
)
def test_evaluate_refuses_with_the_reason(
    lab_store: str, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    path = write(tmp_path, *QUESTIONS)
    given = [each.format(store=lab_store, q=path) for each in arguments]
    executor = [] if "--executor" in given else ["--executor", "serial"]
    media = [] if "--media" in given else ["--media", str(SAMPLES)]
    code, _, err = invoke(
        capsys, "evaluate", *given, *media, "--to", str(tmp_path / "out"), *executor
    )
    assert code == 1
    assert message in err


def test_questions_without_an_answer_are_answered_and_said_not_to_be_scored(
    lab_store: str, tmp_path: Path, capsys: Any
) -> None:
    unanswered = {key: value for key, value in QUESTIONS[0].items() if key != "answer"}
    code, out, err = invoke(
        capsys,
        "evaluate",
        f"{lab_store}#mmer",
        "--prompts",
        write(tmp_path, unanswered, QUESTIONS[1]),
        "--media",
        str(SAMPLES),
        "--to",
        str(tmp_path / "out"),
        "--executor",
        "serial",
        "--max-new-tokens",
        "4",
    )
    assert code == 0, err
    assert (
        "1 of 2 questions have no 'answer' to compare with: they were asked, but not scored" in out
    )
    assert "image/ink" in out
    assert "image/digit" not in out


def test_plots_are_refused_before_the_work(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, *QUESTIONS)
    given = [
        "calibrate",
        str(LAB / "recipes" / "mmer.yaml"),
        "--prompts",
        path,
        "--media",
        str(SAMPLES),
        "--executor",
        "serial",
        "--plot",
    ]
    for plot, message in (
        ("curve.xyz", "expected a name ending in .png, .svg or .pdf"),
        (str(tmp_path / "no" / "c.png"), "there is no folder"),
    ):
        code, _, err = invoke(capsys, *given, plot)
        assert (code, message in err) == (1, True)
    monkeypatch.setattr("mmerge.pipeline.evaluation.report.find_spec", lambda name: None)
    code, _, err = invoke(capsys, *given, "curve.png")
    assert (code, "pip install 'mmerge[evaluate]'" in err) == (1, True)


def lab_recipe(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((LAB / "recipes" / "mmer.yaml").read_text())
    raw["experts"] = {name: raw["experts"][name] for name in ("image", "audio", "video")}
    return raw | {"output": str(folder / "store")}


def test_calibrate_writes_a_recipe_that_is_valid_and_finds_its_files(
    tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "mine.yaml"
    raw = lab_recipe(tmp_path)
    for expert in raw["experts"].values():
        expert["path"] = str((LAB / "recipes" / expert["path"]).resolve())
    raw["base"] = str((LAB / "recipes" / raw["base"]).resolve())
    source.write_text(yaml.safe_dump(raw | {"output": "store"}))
    target = tmp_path / "deeper" / "calibrated.yaml"
    arguments = [
        "calibrate",
        str(source),
        "--prompts",
        write(tmp_path, *QUESTIONS, *OTHERS),
        "--media",
        str(SAMPLES),
        "--scales",
        "0.6,1.0",
        "--executor",
        "serial",
        "--max-new-tokens",
        "4",
        "--to",
        str(target),
        "--plot",
        str(tmp_path / "curve.png"),
    ]
    code, out, err = invoke(capsys, *arguments)
    assert code == 0, err
    assert "from 4 prompts without labels" in out
    made = read_recipe(target)
    assert made.output == str(tmp_path / "store")
    assert all(expert.parameters.mask_scale in (0.6, 1.0) for expert in made.experts)  # type: ignore[attr-defined]
    assert (tmp_path / "curve.png").exists()


def test_right_answers_have_no_influence_on_calibration(tmp_path: Path) -> None:
    recipe = parse_recipe(lab_recipe(tmp_path), folder=LAB / "recipes")
    questions = read_questions(Path(write(tmp_path, *QUESTIONS, *OTHERS)), media_root=SAMPLES)
    blind = [Question(q.id, q.task, text=q.text, media=q.media) for q in questions]
    settings = Settings(max_new_tokens=4)
    found = [
        calibrate(recipe, asked, scales=(0.6, 1.0), settings=settings)
        for asked in (questions, blind)
    ]
    assert found[0] == found[1]
    assert {point.expert for point in found[0].points} == {"image", "audio", "video"}
    assert all(0 <= point.rebuilt.probability <= 1 for point in found[0].points)


MIXED = (
    {
        "id": "5",
        "question": "which digit is in the sound ?",
        "image": "image_four_dark.png",
        "audio": "sound_three_low.wav",
        "answer": "nonsense",
    },
    {
        "id": "6",
        "question": "which digit is in the video ?",
        "image": "image_four_dark.png",
        "video": "video_two_up.gif",
    },
)


def test_prompts_of_several_modalities_want_the_answer_of_the_expert_that_is_surest_alone(
    tmp_path: Path,
) -> None:
    recipe = parse_recipe(lab_recipe(tmp_path), folder=LAB / "recipes")
    questions = read_questions(
        Path(write(tmp_path, *QUESTIONS, *OTHERS, *MIXED)), media_root=SAMPLES
    )
    asking = Asking(
        open_store(recipe.output, create=True),
        Settings(max_new_tokens=4),
        SerialExecutor(),
        LogProgress(),
    )
    own, mixed = ask_experts(recipe, questions, asking)
    assert {name: len(targets.prompts) for name, targets in own.items()} == {
        "image": 2,
        "audio": 1,
        "video": 1,
    }
    assert mixed.experts == (("image", "audio"), ("image", "video"))
    for prompt, answer, experts in zip(mixed.prompts, mixed.answers, mixed.experts, strict=True):
        sure = {}
        for name in experts:
            composite = load_composite(
                f"{recipe.output}#{original_name(recipe, name)}", mode="retention", expert=name
            )
            shown = [part for part in prompt if part.kind in ("text", name)]
            assert len(shown) == len(prompt) - 1
            (tokens,) = composite.generate_tokens([shown], max_new_tokens=4)
            ((likelihood, _),) = composite.score([shown], [tokens])
            sure[name] = (likelihood, tuple(tokens))
        assert answer == max(sure.values())[1]
    found = calibrate(recipe, questions, scales=(0.6, 1.0), settings=Settings(max_new_tokens=4))
    assert found.num_mixed == 2
    for point in found.points:
        assert point.mixed is not None
        expected = (
            point.rebuilt.probability + (point.expanded.probability + point.mixed.probability) / 2
        ) / 2
        assert point.objective == pytest.approx(expected)
    by = {(point.expert, point.mask_scale): point.mixed for point in found.points}
    assert by[("audio", 0.6)] != by[("video", 0.6)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "two and two ?"}, "has no media"),
        (
            {"question": "how deep ?", "depth": "image_four_dark.png"},
            "no expert of the recipe reads 'depth'; they read image, audio, video",
        ),
    ],
)
def test_calibrate_refuses_prompts_that_say_nothing_about_any_expert(
    tmp_path: Path, row: dict[str, str], message: str
) -> None:
    recipe = parse_recipe(lab_recipe(tmp_path), folder=LAB / "recipes")
    questions = read_questions(Path(write(tmp_path, *QUESTIONS, *OTHERS, row)), media_root=SAMPLES)
    with pytest.raises(RecipeError, match=message):
        calibrate(recipe, questions, scales=(0.6,))


@pytest.mark.parametrize(("option", "numbers"), [("scales", (0.5, 20.0)), ("densities", (2.0,))])
def test_calibrate_refuses_numbers_that_no_recipe_may_have(
    tmp_path: Path, option: str, numbers: tuple[float, ...]
) -> None:
    recipe = parse_recipe(lab_recipe(tmp_path), folder=LAB / "recipes")
    with pytest.raises(RecipeError, match=f"--{option}: {numbers[-1]:g}: "):
        calibrate(recipe, [], **{option: numbers})


def test_calibrate_refuses_methods_without_mask_scales_and_experts_without_prompts(
    tmp_path: Path, capsys: Any
) -> None:
    path = write(tmp_path, *QUESTIONS)
    for recipe, message in (
        ("ties", "'ties' has no mask scales"),
        ("mmer", "alone. Give every expert some prompts"),
    ):
        code, _, err = invoke(
            capsys,
            "calibrate",
            str(LAB / "recipes" / f"{recipe}.yaml"),
            "--prompts",
            path,
            "--media",
            str(SAMPLES),
            "--executor",
            "serial",
        )
        assert code == 1
        assert message in err


def original_name(recipe: Recipe, name: str) -> str:
    (expert,) = (each for each in recipe.experts if each.name == name)
    return f"calibrate-expert-{digest_json([expert.uri, recipe.base])[:12]}"


def point(
    scale: float, expert: str, rebuilt: float, expanded: float, *, density: float = 0.8
) -> Point:
    return Point(density, scale, expert, Agreement(rebuilt, 1.0), Agreement(expanded, 1.0))


def test_each_expert_gets_its_best_scale_and_the_smaller_of_equals() -> None:
    points = [
        point(0.6, "a", 0.9, 0.5),
        point(0.8, "a", 0.8, 0.6),
        point(0.6, "b", 0.1, 0.1),
        point(0.8, "b", 0.3, 0.3),
        point(0.6, "a", 0.1, 0.1, density=0.5),
        point(0.8, "a", 0.1, 0.1, density=0.5),
        point(0.6, "b", 0.9, 0.2, density=0.5),
        point(0.8, "b", 0.2, 0.9, density=0.5),
    ]
    assert choose(points) == (0.8, {"a": 0.6, "b": 0.8}, {"a": 0.8, "b": 0.8})
