"""Scores of answers, and performance retention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.evaluation.questions import LETTERS, Question


def score_answer(question: Question, answer: str) -> float:
    """Return the score of an answer in [0, 1] by the question's metric.

    `exact`: 1 if it equals a right answer, ignoring case and white space. `choice`: if the right
    answer is a letter, 1 if the answer starts with it (the rule of MCUB's official evaluation);
    else as `exact`. `rouge`: the largest ROUGE-L F1 over the right answers.

    Raises:
        MmergeError: the question has no right answer, or `rouge-score` is not installed.
    """
    if not question.answers:
        raise MmergeError(
            f"question {question.id!r} of task {question.task!r} has no answer to compare with"
        )
    if question.metric == "rouge":
        scorer = _load_rouge()
        return max(
            float(scorer.score(right, answer)["rougeL"].fmeasure) for right in question.answers
        )
    first_right = question.answers[0]
    if question.metric == "choice" and len(first_right) == 1 and first_right in LETTERS:
        return float(answer.strip()[:1] == first_right)
    return float(normalise(answer) in {normalise(right) for right in question.answers})


def normalise(text: str) -> str:
    """Return a text in lower case, with single spaces and without a final full stop."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().lower()


@cache
def _load_rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise MmergeError(
            "rouge-score is not installed. Run: pip install 'mmerge[evaluate]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=False)


def performance_retention(
    scores: Mapping[str, float], original: Mapping[str, float]
) -> float | None:
    """Return the mean over tasks of score / original score (docs/arithmetic.md, MMER).

    Tasks where the original scores 0 are left out; None if no task remains.
    """
    ratios = [scores[task] / original[task] for task in scores if original.get(task)]
    return sum(ratios) / len(ratios) if ratios else None
