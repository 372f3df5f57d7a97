"""How good an answer is, and what a merged model keeps of the original."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.evaluation.questions import LETTERS, Question


def score_answer(question: Question, answer: str) -> float:
    """Return the score of an answer in [0, 1] by the question's metric.

    `exact`: 1 where it equals a right answer, upper and lower case and blanks aside. `choice`:
    where the right answer is a letter, 1 where the answer's first letter is that one (the rule of
    MCUB's official evaluation); else 1 where it is the right option. `rouge`: the largest ROUGE-L
    F1 over the right answers.

    Raises:
        MmergeError: the question has no right answer, or `rouge-score` is not installed.
    """
    if not question.answers:
        raise MmergeError(
            f"question {question.id!r} of task {question.task!r} has no answer to compare with"
        )
    if question.metric == "rouge":
        return max(
            float(_rouge().score(right, answer)["rougeL"].fmeasure) for right in question.answers
        )
    right = question.answers[0]
    if question.metric == "choice" and len(right) == 1 and right in LETTERS:
        return float(answer.strip()[:1] == right)
    return float(normalise(answer) in {normalise(each) for each in question.answers})


def normalise(text: str) -> str:
    """Return a text in lower case, with single blanks and without a full stop at its end."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().lower()


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise MmergeError("rouge-score is not installed: pip install 'mmerge[evaluate]'") from error
    return RougeScorer(["rougeL"], use_stemmer=False)


def performance_retention(
    scores: Mapping[str, float], original: Mapping[str, float]
) -> float | None:
    """Return the mean over tasks of score / original score (docs/arithmetic.md); tasks where the
    original has 0 are left out.

    None where no task is left.
    """
    ratios = [scores[task] / original[task] for task in scores if original.get(task)]
    return sum(ratios) / len(ratios) if ratios else None
