"""Every interleaving of a few processes over one store, call by call.

A process is a function of the answers to its store calls. Its next call is found by running the
product code again on the answers so far, once for each distinct sequence of answers, so that the
search itself handles only small records. States with equal stores and equal answers are explored
once.

A process that is killed at some point is one that makes no further call, and every state of the
search is checked; so a kill at each point is covered without a step of its own.

When time passes, every process is suspended before its next call. The protocol assumes that some
calls follow at once upon the check before them (docs/storage.md): a process whose next call is such
a one is suspended before that check instead, so that its last answer arrives late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

import models.clockwork as clockwork
from models.clockwork import EPOCH, Clock
from models.simulated_modules import simulated_timing

import mmerge.manifests.maintenance.lease as lease_module
from mmerge.manifests.errors import AlreadyExists, MmergeError, NotFound
from mmerge.manifests.maintenance.lease import Timing
from mmerge.manifests.stores.base import MAX_READ_BYTES, Listed, OnPart, Store
from mmerge.manifests.stores.writer import BufferedSink

Contents = dict[str, tuple[bytes, float]]
"""Bytes and time of change, by key."""
Answer = tuple[Any, float]
"""What a call returned or raised, and the time of it."""
Program = Callable[[Store], Any]
EFFECTS = frozenset({"put", "put_new", "delete"})
"""Verbs of calls that change a store."""


class _Pending(BaseException):
    """The product code makes a call that has no answer yet."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call


class _StandIn:
    """What product code sees of the simulation: a clock, and settings."""

    is_killed = False
    number = 0
    name = "explored"

    def __init__(self, store: AnsweringStore, number: int) -> None:
        self.store, self.clock, self.number = store, Clock(), number
        self.settings: dict[str, Any] = {}
        self.children: list[Any] = []
        self.bypasses: list[Any] = []

    def sleep(self, seconds: float) -> None:
        self.store.ask("sleep", "", seconds)


class AnsweringStore(Store):
    """Answers the calls of which it has the answers, and stops at the next one."""

    is_remote: ClassVar[bool] = False
    uri = "model://explored"

    def __init__(self, answers: tuple[Answer, ...], number: int, *, is_clock_frozen: bool) -> None:
        self._answers = answers
        self._position = 0
        self._pending: _Pending | None = None
        self._is_clock_frozen = is_clock_frozen
        self.process = _StandIn(self, number)
        if answers:  # a process begins at its first call
            self.process.clock.seconds = answers[0][1]

    def ask(self, verb: str, key: str, data: Any = None) -> Any:
        if self._position == len(self._answers):
            # What cleans up after the first unanswered call may make calls, too: they do not count.
            self._pending = self._pending or _Pending((verb, key, data))
            raise self._pending
        value, seconds = self._answers[self._position]
        self._position += 1
        if not self._is_clock_frozen:
            self.process.clock.seconds = seconds
        if isinstance(value, type) and issubclass(value, Exception):
            raise value(f"{self.uri}: {key}")
        return value

    @classmethod
    def open(cls, uri: str, *, create: bool) -> AnsweringStore:
        raise NotFound(uri)

    def num_bytes(self, key: str) -> int:
        return len(self.ask("read", key))

    def identity(self, key: str) -> str:
        return str(self.ask("read", key))

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        data: bytes = self.ask("read", key)
        return data

    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        return memoryview(self.ask("read", key))[offset : offset + num_bytes]

    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        for key, num_bytes, seconds in self.ask("list", f"{prefix}/" if prefix else ""):
            yield Listed(key, num_bytes, EPOCH + timedelta(seconds=seconds))

    def put_new(self, key: str, data: bytes) -> None:
        self.ask("put_new", key, bytes(data))

    def put(self, key: str, data: bytes) -> None:
        self.ask("put", key, bytes(data))

    def open_sink(self, key: str) -> BufferedSink:
        return BufferedSink(lambda data: self.put(key, data))

    def delete(self, key: str) -> None:
        self.ask("delete", key)


def explored_timing() -> Timing:
    """Return the timing of a lease that is renewed by no thread.

    A process is suspended whenever time passes.
    """
    return replace(simulated_timing(), is_renewed_by_thread=False)


@dataclass(frozen=True)
class State:
    """One state of the store and of all processes."""

    contents: int
    """The number of the contents of the store."""
    histories: tuple[int, ...]
    """By process, the number of its sequence of answers."""
    seconds: float
    jumps: int
    """How many times the clock may still jump."""
    meanings: frozenset[tuple[str, bytes]]
    """Every reference that was ever stored."""


@dataclass
class Explorer:
    """Explores all interleavings of some programs.

    `check` is called with each call that has an effect: process, verb, key, contents before it,
    contents after it. `check_result` with each result of a program, and the contents then. Both
    return a fault, or None.
    """

    programs: tuple[Program, ...]
    check: Callable[[int, str, str, Contents, Contents], str | None]
    check_result: Callable[[int, Any, Contents], str | None]
    jumps: int = 1
    jump_seconds: float = 16 * 60.0
    prompt_verbs: frozenset[str] = frozenset({"delete"})
    """Verbs of calls that follow at once upon the check before them."""
    has_frozen_clocks: bool = False
    """Whether the processes' own clocks stand still while time passes, as on a suspended machine.

    A check can then not see the suspension, so that nothing may happen before a prompt call.
    """
    most_states: int = 10**9
    num_states: int = 0
    num_steps: int = 0
    num_replays: int = 0
    deleted: set[str] = field(default_factory=set)
    """Keys that some process deleted in some interleaving."""
    errors: set[str] = field(default_factory=set)
    """Types of the errors with which processes ended in some interleaving."""
    _numbers: dict[tuple[int, int, Any], int] = field(default_factory=dict)
    _answers: list[tuple[Answer, ...]] = field(default_factory=lambda: [()])
    _origins: dict[int, tuple[int, tuple[Any, ...]]] = field(default_factory=dict)
    """By history, the one before its last answer, and the call that was answered."""
    _nexts: dict[tuple[int, int], tuple[str, Any]] = field(default_factory=dict)
    _contents: list[Contents] = field(default_factory=list)
    """By number; equal contents have one number."""
    _contents_numbers: dict[frozenset[tuple[str, tuple[bytes, float]]], int] = field(
        default_factory=dict
    )
    _effects: dict[tuple[int, float, str, str, Any], tuple[int, Any]] = field(default_factory=dict)
    """By contents, time and call: the contents after it, and its answer."""

    def explore(self, contents: Contents, *, seconds: float) -> str | None:
        """Return the first fault, with the interleaving that leads to it; None if there is none."""
        first = State(
            contents=self._number_contents(contents),
            histories=(0,) * len(self.programs),
            seconds=seconds,
            jumps=self.jumps,
            meanings=frozenset(),
        )
        waiting: list[tuple[State, Any]] = [(first, None)]
        visited = {first}
        with mock.patch.object(lease_module, "Timing", explored_timing):
            while waiting and self.num_states < self.most_states:
                state, path = waiting.pop()
                self.num_states += 1
                for label, successor, fault in self._successors(state):
                    self.num_steps += 1
                    if fault is not None:
                        return f"{fault}\n" + _describe((label, path))
                    if successor not in visited:
                        visited.add(successor)
                        waiting.append((successor, (label, path)))
        return None

    def _successors(self, state: State) -> Iterator[tuple[str, State, str | None]]:
        contents = self._contents[state.contents]
        num_running = 0
        prompt_process = self._find_prompt(state) if self.has_frozen_clocks else None
        for process, history in enumerate(state.histories):
            kind, call = self._next(process, history)
            if kind != "call" or prompt_process not in (None, process):
                continue
            verb, key, data = call
            if verb == "sleep" and not self._is_woken(history, contents):
                continue
            num_running += 1
            stored, value = self._find_effect(state, verb, key, data)
            after = self._contents[stored]
            fault = None
            if verb == "delete" and key in contents:
                self.deleted.add(key)
            if verb in EFFECTS:
                fault = self.check(process, verb, key, contents, after)
            answer = self._number(process, history, (value, state.seconds))
            self._origins[answer] = history, call
            histories = (*state.histories[:process], answer, *state.histories[process + 1 :])
            meanings = state.meanings
            is_reference = key.startswith("refs/") and key.endswith(".json")
            is_deleted = f"{key.removesuffix('.json')}.deleted" in contents
            if verb == "put_new" and value is None and is_reference and not is_deleted:
                meanings = meanings | {(key, data)}
                fault = fault or _find_two_meanings(meanings, key)
            kind, result = self._next(process, answer)
            if kind == "result" and fault is None:
                fault = self.check_result(process, result, after)
            label = f"{process}: {verb} {key} -> {_show(value)}"
            yield label, State(stored, histories, state.seconds, state.jumps, meanings), fault
        if state.jumps and num_running and prompt_process is None:
            histories = self._suspend(state)
            seconds = state.seconds + self.jump_seconds
            successor = State(state.contents, histories, seconds, state.jumps - 1, state.meanings)
            yield "time passes", successor, None

    def _is_prompt(self, process: int, history: int) -> bool:
        """Return whether the next call of a process follows at once upon the check before it."""
        kind, call = self._next(process, history)
        return kind == "call" and call[0] in self.prompt_verbs and history in self._origins

    def _find_prompt(self, state: State) -> int | None:
        """Return the process whose next call is prompt, None if there is none."""
        for process, history in enumerate(state.histories):
            if self._is_prompt(process, history):
                return process
        return None

    def _suspend(self, state: State) -> tuple[int, ...]:
        """Return the histories after all processes were suspended."""
        histories = list(state.histories)
        for process, history in enumerate(state.histories):
            if not self._is_prompt(process, history):
                continue
            before, answered_call = self._origins[history]
            value, _ = self._answers[history][-1]
            late = self._number(process, before, (value, state.seconds + self.jump_seconds))
            self._origins[late] = before, answered_call
            histories[process] = late
        return tuple(histories)

    def _number_contents(self, contents: Contents) -> int:
        name = frozenset(contents.items())
        if name not in self._contents_numbers:
            self._contents_numbers[name] = len(self._contents)
            self._contents.append(contents)
        return self._contents_numbers[name]

    def _find_effect(self, state: State, verb: str, key: str, data: Any) -> tuple[int, Any]:
        """Return the number of the contents after a call, and its answer."""
        effect = (state.contents, state.seconds, verb, key, data)
        if effect not in self._effects:
            after = dict(self._contents[state.contents])
            value = _apply(after, state.seconds, verb, key, data)
            number = self._number_contents(after) if verb in EFFECTS else state.contents
            self._effects[effect] = number, value
        return self._effects[effect]

    def _is_woken(self, history: int, contents: Contents) -> bool:
        """Return whether a process that polls a listing would see another one than last time.

        One that polls an unchanged listing comes back to where it is.
        """
        while history in self._origins:
            before, (verb, key, _) = self._origins[history]
            if verb == "list":
                return bool(_apply(contents, 0.0, verb, key, None) != self._answers[history][-1][0])
            if verb != "sleep":
                return True
            history = before
        return True

    def _number(self, process: int, history: int, answer: Answer) -> int:
        """Return the number of a history with one more answer."""
        value, seconds = answer
        name = value.__name__ if isinstance(value, type) else value
        key = (process, history, (name, seconds))
        if key not in self._numbers:
            self._answers.append((*self._answers[history], answer))
            self._numbers[key] = len(self._answers) - 1
        return self._numbers[key]

    def _next(self, process: int, history: int) -> tuple[str, Any]:
        """Return a process's next call after some answers, or its result, or its error."""
        key = process, history
        if key not in self._nexts:
            self.num_replays += 1
            self._nexts[key] = kind, found = self._replay(process, self._answers[history])
            if kind == "error":
                self.errors.add(type(found).__name__)
        return self._nexts[key]

    def _replay(self, process: int, answers: tuple[Answer, ...]) -> tuple[str, Any]:
        store = AnsweringStore(answers, process + 1, is_clock_frozen=self.has_frozen_clocks)
        clockwork._local.process = store.process
        try:
            return "result", self.programs[process](store)
        except _Pending as pending:
            return "call", pending.call
        except MmergeError as error:
            return "error", error
        finally:
            clockwork._local.process = None


def _apply(contents: Contents, seconds: float, verb: str, key: str, data: Any) -> Any:
    """Apply one call to the contents; return its answer."""
    if verb == "read":
        return contents[key][0] if key in contents else NotFound
    if verb == "list":
        return tuple(
            (name, len(stored[0]), stored[1])
            for name, stored in sorted(contents.items())
            if name.startswith(key)
        )
    if verb == "put_new" and key in contents:
        return AlreadyExists
    if verb in ("put", "put_new"):
        contents[key] = data, seconds
    elif verb == "delete":
        contents.pop(key, None)
    return None


def _find_two_meanings(meanings: frozenset[tuple[str, bytes]], key: str) -> str | None:
    builds = {_build_of(data) for name, data in meanings if name == key}
    return f"{key} had two meanings" if len(builds) > 1 else None


def _build_of(data: bytes) -> str:
    return str(json.loads(data)["build"])


def _show(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple):
        return f"{len(value)} keys"
    return "" if value is None else "bytes"


def _describe(path: Any) -> str:
    lines = []
    while path is not None:
        label, path = path
        lines.append(label)
    return "\n".join(f"  {line}" for line in reversed(lines))
