"""Questions from a user's own files and from MCUB, and how answers are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.pipeline.evaluation.mcub import MCUB_TEMPLATE, read_mcub
from mmerge.pipeline.evaluation.questions import Question, read_questions
from mmerge.pipeline.evaluation.scores import performance_retention, score_answer
from mmerge.workers.modalities.prompt import Part


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_line_is_a_question_with_media_or_a_whole_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {
            "id": 1,
            "question": "what ?",
            "image": ["a.png", "b.png"],
            "audio": "c.wav",
            "answer": "yes",
            "task": "t",
        },
        {"parts": [{"text": "look : "}, {"point": "d.npy"}], "answer": ["a b", "b a"]},
        {"question": "which ?", "options": ["red", "blue"], "answer": "blue", "letters": True},
    )
    first, second, third = read_questions(path)
    assert [(part.kind, Path(part.value).name) for part in first.media] == [
        ("image", "a.png"),
        ("image", "b.png"),
        ("audio", "c.wav"),
    ]
    assert (first.id, first.task, first.metric) == ("1", "t", "exact")
    assert second.parts == (Part("text", "look : "), Part("point", str(tmp_path / "d.npy")))
    assert second.metric == "rouge"
    assert third.answers == ("B",)
    assert (
        third.text
        == "which ?\nA. red\nB. blue\nAnswer with the option's letter from the given choices"
        " directly."
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 1: expected an object"),
        ({"task": "t"}, "line 1: has neither a question nor a file"),
        ({"question": "?", "image": "../secret.png"}, "line 1: ../secret.png lies outside"),
        ({"question": "?", "image": "/etc/passwd"}, "lies outside"),
        ({"question": "?", "metric": "bleu"}, "metric: expected exact, choice, rouge, got 'bleu'"),
        (
            {"parts": [{"text": "a"}], "question": "?"},
            "'parts' is the whole prompt. Leave out question",
        ),
        (
            {"question": "?", "options": ["a", "b"], "answer": "c", "letters": True},
            "'c' is none of the options",
        ),
        ({"question": "?", "image": 3}, "expected a string or a list of strings"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(").replace("?", r"\?")):
        read_questions(write(tmp_path / "q.jsonl", row))


def test_an_id_stands_once_in_a_task(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has id '1' twice"):
        read_questions(
            write(tmp_path / "q.jsonl", {"id": 1, "question": "a"}, {"id": 1, "question": "b"})
        )


MCUB_ROW = {
    "id": "mcub_7",
    "conversations": [
        {
            "from": "human",
            "value": (
                "<image>\n<audio>\n<video>\n<point>\nWhich is common ?\nA. a dog\nB. a cat\nC. a"
                " car\nD. rain"
            ),
        },
        {"from": "gpt", "value": "A"},
    ],
    "modal_inputs": {
        "vision": ["i.jpg"],
        "audio": ["a.flac"],
        "video": ["v.mp4"],
        "point": ["p.npy"],
    },
}


def test_mcub_is_read_as_published(tmp_path: Path) -> None:
    path = tmp_path / "MCUB-4.json"
    path.write_text(json.dumps([MCUB_ROW]))
    (question,) = read_mcub(path)
    assert (question.id, question.task, question.metric, question.answers) == (
        "mcub_7",
        "MCUB-4",
        "choice",
        ("A",),
    )
    parts = question.to_prompt(
        template="another {text}", media_templates={"image": "not this {media}"}
    )
    head, tail = MCUB_TEMPLATE.split("{text}")
    assert [part.kind for part in parts] == [
        "text",
        "image",
        "text",
        "audio",
        "text",
        "video",
        "text",
        "point",
        "text",
    ]
    assert "".join(part.value if part.kind == "text" else f"<{part.kind}>" for part in parts) == (
        head + MCUB_ROW["conversations"][0]["value"] + tail  # type: ignore[index]
    )


def test_mcub_takes_its_answers_from_a_second_file_and_its_media_from_a_folder(
    tmp_path: Path,
) -> None:
    asked, answers = tmp_path / "MCUB-4.json", tmp_path / "MCUB-answer.json"
    without = {
        **MCUB_ROW,
        "conversations": [MCUB_ROW["conversations"][0], {"from": "gpt", "value": None}],
    }  # type: ignore[index]
    asked.write_text(json.dumps([without]))
    answers.write_text(
        json.dumps(
            [
                {
                    "id": "mcub_7",
                    "conversations": [
                        {"from": "human", "value": ""},
                        {"from": "gpt", "value": "D"},
                    ],
                }
            ]
        )
    )
    with pytest.raises(
        RecipeError, match=r"mcub_7: has no answer\. Give the file of answers with --answers"
    ):
        read_mcub(asked)
    (question,) = read_mcub(asked, answers=answers, media_root=tmp_path / "media")
    assert question.answers == ("D",)
    assert question.media[0].value == str(tmp_path / "media" / "i.jpg")
    asked.write_text(json.dumps([{**MCUB_ROW, "modal_inputs": {"vision": ["/etc/passwd"]}}]))
    with pytest.raises(RecipeError, match="lies outside"):
        read_mcub(asked)


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        (Question("1", "t", answers=("Seven",)), " seven. ", 1.0),
        (Question("1", "t", answers=("seven",)), "seven up", 0.0),
        (Question("1", "t", answers=("B",), metric="choice"), "B. a cat", 1.0),
        (Question("1", "t", answers=("B",), metric="choice"), "A or B", 0.0),
        (
            Question("1", "t", answers=("odd",), options=("odd", "even"), metric="choice"),
            "odd",
            1.0,
        ),
        (Question("1", "t", answers=("odd",), options=("odd", "even"), metric="choice"), "o", 0.0),
        (Question("1", "t", answers=("a cat sat", "the dog"), metric="rouge"), "a cat sat", 1.0),
    ],
)
def test_an_answer_is_scored_by_its_metric(question: Question, answer: str, score: float) -> None:
    assert score_answer(question, answer) == score


def test_rouge_is_the_best_over_the_right_answers() -> None:
    # Longest common subsequence 2 of 3 and 4 words: precision 2/4, recall 2/3, F1 4/7.
    question = Question(
        "1", "t", answers=("nothing alike here now", "three light ink"), metric="rouge"
    )
    assert score_answer(question, "three in dark ink") == pytest.approx(4 / 7)


def test_a_question_without_an_answer_has_no_score() -> None:
    with pytest.raises(MmergeError, match="'1' of task 't' has no answer"):
        score_answer(Question("1", "t"), "x")


def test_performance_retention_is_a_mean_of_ratios() -> None:
    assert performance_retention(
        {"a": 0.4, "b": 0.9, "c": 0.5}, {"a": 0.8, "b": 0.9, "c": 0.0}
    ) == pytest.approx(0.75)
    assert performance_retention({"c": 0.5}, {"c": 0.0}) is None
