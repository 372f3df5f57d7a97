"""Tokens of running generations, handed over one by one to whoever waits for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch

from mmerge.workers.generation.token_text import TokenText

Receiver = Callable[[int], bool]
"""Called with each token of an answer in turn; returns whether the answer is to go on."""


class TokenRelay:
    """A stopping criterion of transformers: it sees every token, and ends each row by itself.

    A streamer of transformers sees the tokens too, but can end nothing.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        *,
        end_tokens: int | Collection[int] | None,
        can_stop: bool,
    ) -> None:
        """Hand over to `receivers`, one per row; without `can_stop` rows end at end tokens only."""
        self._receivers: list[Receiver | None] = list(receivers)
        self._end_tokens = frozenset(
            [end_tokens] if isinstance(end_tokens, int) else end_tokens or ()
        )
        self._can_stop = can_stop

    def __call__(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return which rows have ended, bool [rows]; `tokens` is int64 [rows, length so far]."""
        for row, token in enumerate(tokens[:, -1].tolist()):
            receive = self._receivers[row]
            # Behind its end token a row is padded.
            if receive is not None and (not receive(token) or token in self._end_tokens):
                self._receivers[row] = None
        ended = [self._can_stop and receive is None for receive in self._receivers]
        return torch.tensor(ended, device=tokens.device)


def stream_text(generate: Callable[[Receiver], None], *, tokenizer: Any) -> Iterator[str]:
    """Yield the text of an answer piece by piece while `generate` runs on a thread.

    Args:
        generate: calls the receiver that it gets with each token. Its errors are raised here.
        tokenizer: of the answer.
    """
    text = TokenText(tokenizer)
    pieces: SimpleQueue[str | None] = SimpleQueue()
    failures: list[BaseException] = []
    is_closed = Event()

    def receive(token: int) -> bool:
        pieces.put(text.push(token))
        return not is_closed.is_set()

    def run() -> None:
        try:
            generate(receive)
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            failures.append(error)
        pieces.put(None)

    thread = Thread(target=run, name="mmerge-generate", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if piece:
                yield piece
        if not failures and (piece := text.finish()):
            yield piece
    finally:
        is_closed.set()
        thread.join()
    if failures:
        raise failures[0]
