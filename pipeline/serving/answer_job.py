"""One answer that a server owes: its prompt, and the events that tell how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from mmerge.workers.generation.token_text import TokenText
from mmerge.workers.modalities.prompt import Part

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Started:
    """The prompt is encoded and its generation begins."""

    num_prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Text that the answer goes on with."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer has ended: at its end token or a stop text, or at the permitted length."""

    reason: FinishReason
    num_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event: TypeAlias = Started | Piece | Finished | Failed


@dataclass(eq=False)
class AnswerJob:
    """A prompt for one model, from the queue to its last token.

    Call order: `start`, then `receive` per token until it returns False; `fail` at any time ends
    it. Exactly one of `Finished` and `Failed` is told, last. `on_end` is called after it, from the
    thread of the scheduler: until then files of the prompt may be read.
    """

    model: Any
    """Holds the composite that answers; jobs of one model share batches."""
    parts: Sequence[Part]
    tell: Callable[[Event], None]
    max_new_tokens: int | None = None
    """As many as the server gives if None."""
    options: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    on_end: Callable[[], None] = lambda: None
    arrived: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _ended: bool = False

    def cancel(self) -> None:
        """Let nobody wait for it any more: it leaves the queue, or ends with the next token."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether its client has left."""
        return self._cancelled.is_set()

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Jobs of equal keys can be generated in one batch.

        A seed is of no use where others draw from the same generator, so such a job is alone.
        """
        alone = id(self) if "seed" in self.options else None
        return id(self.model), alone, tuple(sorted(self.options.items()))

    def start(
        self, *, tokenizer: Any, end_tokens: frozenset[int], num_prompt_tokens: int, max_tokens: int
    ) -> None:
        """Begin an answer of at most `max_tokens`."""
        self._text = TokenText(tokenizer)
        self._end_tokens = end_tokens
        self._max_tokens = max_tokens
        self._pending = ""
        self.tell(Started(num_prompt_tokens))

    def receive(self, token: int) -> bool:
        """Take a token of the answer; return whether the answer goes on."""
        if self.is_cancelled:
            self._end(Finished("stop", self._text.num_tokens))
            return False
        is_end = token in self._end_tokens
        is_longest = self._text.num_tokens + 1 >= self._max_tokens
        piece = self._text.push(token)
        if is_end or is_longest:
            piece += self._text.finish()
        if self._release(piece, is_last=is_end or is_longest):
            self._end(Finished("stop", self._text.num_tokens))
            return False
        if is_end or is_longest:
            self._end(Finished("stop" if is_end else "length", self._text.num_tokens))
            return False
        return True

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self._end(Failed(error))

    def _release(self, piece: str, *, is_last: bool) -> bool:
        """Tell text that no stop text can begin in; return whether a stop text has come."""
        text = self._pending + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self._tell_text(text[: min(places)])
            return True
        held = 0 if is_last else _longest_start(text, self.stops)
        self._pending = text[len(text) - held :]
        self._tell_text(text[: len(text) - held])
        return False

    def _tell_text(self, text: str) -> None:
        if text:
            self.tell(Piece(text))

    def _end(self, event: Finished | Failed) -> None:
        if self._ended:
            return
        self._ended = True
        self.tell(event)
        self.on_end()


def _longest_start(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last characters of a text may be the start of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
