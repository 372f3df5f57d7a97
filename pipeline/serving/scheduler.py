"""The queue of a server: one thread takes prompts that fit together and answers them in a batch.

One thread works for all models of a server: from the encoding of a prompt to its last token nothing
else touches the composite. So a request whose client has left keeps its turn until its work has
ended, and a next one cannot begin before that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.errors import PromptError
from mmerge.pipeline.serving.answer_job import AnswerJob
from mmerge.pipeline.serving.server_metrics import ServerMetrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSettings:
    """What one batch may be, and how long the queue."""

    max_batch: int = 16
    """Prompts that are generated together."""
    max_batch_tokens: int = 32_768
    """Tokens of a batch, padding and answers included, unless one prompt alone has more."""
    max_queue: int = 64
    """Prompts that wait; a further one is refused."""
    max_prompt_tokens: int | None = None
    """Tokens of one prompt; the model's maximum if None."""
    default_new_tokens: int = 512
    """Tokens of an answer whose length a request leaves open, at most."""
    wait_s: float = 0.004
    """Seconds that a first prompt waits for others, since clients of the last batch come back at
    once.
    """


class QueueFull(Exception):
    """As many prompts wait as may."""


@dataclass(frozen=True)
class _Row:
    """An encoded prompt of a batch."""

    job: AnswerJob
    embedded: Any
    num_tokens: int
    max_tokens: int


class Scheduler:
    """Answers jobs on a thread of its own, which `close` ends."""

    def __init__(self, settings: BatchSettings, *, metrics: ServerMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._queue: deque[AnswerJob] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="mmerge-serve", daemon=True)
        self._thread.start()

    def submit(self, job: AnswerJob) -> None:
        """Queue a job. Raises QueueFull."""
        with self._changed:
            waiting = sum(not queued.is_cancelled for queued in self._queue)
            if self._is_closed or waiting >= self._settings.max_queue:
                raise QueueFull
            self._queue.append(job)
            self._metrics.queued.set(len(self._queue))
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its batch; jobs that wait fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            batch = self._take()
            try:
                self._answer(batch)
            except Exception as error:  # noqa: BLE001 - the next batch is answered
                _log.exception("a batch of %d prompts failed", len(batch))
                for job in batch:
                    job.fail(error)
            # Nothing may keep a model or media until the next batch comes.
            del batch
        for job in self._queue:
            job.fail(RuntimeError("the server ends"))

    def _take(self) -> list[AnswerJob]:
        """Return the jobs of the next batch, in the order of their arrival; none at the end.

        None, too, where all that waited have left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            until = time.monotonic() + self._settings.wait_s
            self._changed.wait_for(
                lambda: len(self._queue) >= self._settings.max_batch or self._is_closed,
                timeout=until - time.monotonic(),
            )
            if self._is_closed:
                return []
            batch: list[AnswerJob] = []
            others: deque[AnswerJob] = deque()
            while self._queue:
                job = self._queue.popleft()
                if job.is_cancelled:
                    job.fail(RuntimeError("its client has left"))
                elif len(batch) < self._settings.max_batch and (
                    not batch or job.batch_key == batch[0].batch_key
                ):
                    batch.append(job)
                else:
                    others.append(job)
            self._queue = others
            self._metrics.queued.set(len(others))
        return batch

    def _answer(self, batch: Sequence[AnswerJob]) -> None:
        if not batch:
            return
        composite = batch[0].model.composite
        end = composite.tokenizer.eos_token_id
        end_tokens = frozenset(() if end is None else (end,))
        with composite.turn:
            rows = [row for job in batch for row in self._encode(job, composite)]
            for group in self._split(rows, context=composite.context_tokens):
                for row in group:
                    self._metrics.waited.observe(time.monotonic() - row.job.arrived)
                    row.job.start(
                        tokenizer=composite.tokenizer,
                        end_tokens=end_tokens,
                        num_prompt_tokens=row.num_tokens,
                        max_tokens=row.max_tokens,
                    )
                self._metrics.batch_size.observe(len(group))
                composite.generate_rows(
                    [row.embedded for row in group],
                    [row.job.receive for row in group],
                    max_new_tokens=max(row.max_tokens for row in group),
                    **batch[0].options,
                )

    def _encode(self, job: AnswerJob, composite: Any) -> Iterator[_Row]:
        """Yield the row of a job; an input that cannot be read fails this job alone."""
        try:
            embedded = composite.embed(job.parts)
            num_tokens = len(embedded.ids)
            yield _Row(job, embedded, num_tokens, self._limit(job, num_tokens, composite))
        except PromptError as error:
            job.fail(error)
        except Exception as error:  # noqa: BLE001 - the others are answered
            _log.exception("a prompt cannot be encoded")
            job.fail(error)

    def _limit(self, job: AnswerJob, num_tokens: int, composite: Any) -> int:
        """Return how many tokens an answer may have. Raises PromptError if there is no room."""
        longest = self._settings.max_prompt_tokens
        if longest is not None and num_tokens > longest:
            raise PromptError(f"the prompt has {num_tokens:,} tokens, at most {longest:,} are read")
        context = composite.context_tokens
        room = self._settings.default_new_tokens
        if context is not None and job.max_new_tokens is None:
            room = max(1, min(room, context - num_tokens))
        wanted = job.max_new_tokens or room
        composite.check_length(num_tokens, wanted)
        return wanted

    def _split(self, rows: Sequence[_Row], *, context: int | None) -> Iterator[list[_Row]]:
        """Yield the batches of encoded prompts: each fits the model and the memory, padded."""
        group: list[_Row] = []
        for row in rows:
            wider = [*group, row]
            length = max(r.num_tokens for r in wider) + max(r.max_tokens for r in wider)
            is_too_long = context is not None and length > context
            if group and (is_too_long or length * len(wider) > self._settings.max_batch_tokens):
                yield group
                group = [row]
            else:
                group = wider
        if group:
            yield group
