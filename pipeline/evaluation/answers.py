"""Answers of a model at every coefficient of a grid, from which AdaMMS chooses."""

from __future__ import annotations

from pathlib import Path

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import RecipeError

MAX_ANSWERS_BYTES = 1 << 30


def read_answers(path: Path) -> dict[float, list[str]]:
    """Return the answers by coefficient from a JSON file {"0.0": ["…", …], …}.

    Raises:
        RecipeError: the file is missing or malformed, or the numbers of answers differ.
    """
    try:
        raw = parse_json(path.read_bytes(), what=str(path), max_bytes=MAX_ANSWERS_BYTES)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file of answers") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: expected an object with a list of answers per coefficient, got a"
            f" {type(raw).__name__}"
        )
    answers: dict[float, list[str]] = {}
    for key, values in raw.items():
        try:
            alpha = float(key)
        except ValueError:
            raise RecipeError(
                f"{path}: expected coefficients as keys (0.0, 0.1, …), got {key!r}"
            ) from None
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise RecipeError(f"{path}: {key}: expected a list of answers, each a string")
        answers[alpha] = values
    counts = {alpha: len(values) for alpha, values in sorted(answers.items())}
    if len(answers) < 2 or len(set(counts.values())) != 1 or 0 in counts.values():
        raise RecipeError(
            f"{path}: expected at least two coefficients with answers to the same questions, got"
            f" these numbers of answers: {counts or 'none'}"
        )
    return answers
