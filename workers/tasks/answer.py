"""Answer prompts with a composite, or score answers, for `mmerge evaluate` and `calibrate`."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import DamagedObject, NotFound, RecipeError
from mmerge.manifests.stores.base import Store
from mmerge.workers.composite.loader import Mode, load_composite
from mmerge.workers.composite.model import Composite
from mmerge.workers.modalities.prompt import QUESTION, Part
from mmerge.workers.task import AnswerTask, TaskResult

MAX_ANSWERS_BYTES = 1 << 28


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, and its tokens up to and with the end token."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds an answer."""

    log_probability: float
    """Mean natural logarithm over the answer's tokens."""
    is_greedy: bool
    """Whether greedy decoding gives exactly this answer."""


ASK_AGAIN = "The same command, given again, asks again"


def answers_key(key: str) -> str:
    """Return the key of the result of an AnswerTask."""
    return f"answers/{key}.json"


def answer_prompts(task: AnswerTask, store: Store) -> TaskResult:
    """Answer the prompts of a task, or score its targets, unless the result is stored already.

    Raises:
        ManifestError, StoreError: the model cannot be read, or the result not be written.
        PromptError: a prompt does not fit the model.
    """
    start_time = time.monotonic()
    reused = not task.fresh and has_answers(store, task.key)
    if not reused:
        # One task at a time per process: tasks share the model, which answers one call at a time.
        with _lock:
            rows = _answer(task, _load_model(task))
        store.put(answers_key(task.key), json.dumps(rows).encode())
    return TaskResult(
        task.shard, 0 if reused else task.num_bytes, reused, time.monotonic() - start_time
    )


def has_answers(store: Store, key: str) -> bool:
    """Return whether the store has the result of a task; a damaged one is none."""
    try:
        read_answers(store, key)
    except (NotFound, DamagedObject):
        return False
    return True


def read_answers(store: Store, key: str) -> list[Answer] | list[Likelihood]:
    """Return the result of a task, one per prompt. Raises NotFound, DamagedObject."""
    where = f"{store.uri}: {answers_key(key)}"
    try:
        raw = parse_json(store.read(answers_key(key)), what="answers", max_bytes=MAX_ANSWERS_BYTES)
        if isinstance(raw, dict) and "answers" in raw:
            return [Answer(str(text), tuple(map(int, tokens))) for text, tokens in raw["answers"]]
        if isinstance(raw, dict):
            return [Likelihood(float(value), bool(same)) for value, same in raw["likelihoods"]]
    except NotFound:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedObject(f"{where}: is damaged ({error}). {ASK_AGAIN}") from error
    raise DamagedObject(f"{where}: is damaged. {ASK_AGAIN}")


def _answer(task: AnswerTask, composite: Composite) -> dict[str, list[tuple[object, object]]]:
    rows: list[tuple[object, object]] = []
    formatted = [_format(parts, composite) for parts in task.prompts]
    for start, prompts in _batches(formatted, task.batch_size):
        if task.targets is None:
            for tokens in composite.generate_tokens(prompts, max_new_tokens=task.max_new_tokens):
                text = composite.tokenizer.decode(tokens, skip_special_tokens=True)
                rows.append((text.strip(), tokens))
        else:
            rows += composite.score(prompts, task.targets[start : start + len(prompts)])
    return {"answers" if task.targets is None else "likelihoods": rows}


def _format(parts: Sequence[Part], composite: Composite) -> Sequence[Part]:
    """Return the parts of a prompt, formatted by the composite where they are not yet."""
    if parts and parts[0].kind == QUESTION:
        return composite.prompt(parts[0].value, parts[1:])
    return parts


def _batches(
    prompts: Sequence[Sequence[Part]], size: int
) -> Iterator[tuple[int, Sequence[Sequence[Part]]]]:
    for start in range(0, len(prompts), size):
        yield start, prompts[start : start + size]


_lock = Lock()
_loaded: dict[tuple[object, ...], Composite] = {}
_registered: set[str] = set()


def _load_model(task: AnswerTask) -> Composite:
    """Return the task's model. The last one is kept: the next task is likely to use it too."""
    key = (task.model, task.expert, task.device, task.encoders)
    if key not in _loaded:
        _loaded.clear()
        for target in task.encoders:
            register_from(target)
        mode: Mode = "retention" if task.expert else "expansion"
        _loaded[key] = load_composite(task.model, mode=mode, expert=task.expert, device=task.device)
    return _loaded[key]


def register_from(target: str) -> None:
    """Call the user's MODULE:FUNCTION, which registers encoders, once per process.

    Raises:
        RecipeError: there is no such module or function.
    """
    if target in _registered:
        return
    module, colon, function = target.partition(":")
    if not colon or not module or not function:
        raise RecipeError(f"--encoders: expected MODULE:FUNCTION, got {target!r}")
    try:
        getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"--encoders: {target}: {error}. The module must be on PYTHONPATH, on every node"
        ) from error
    _registered.add(target)
