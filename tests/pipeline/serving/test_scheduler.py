"""The queue of a server: what shares a batch, what ends an answer, and what a failure touches."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_composite import FakeComposite

from mmerge.manifests.errors import PromptError
from mmerge.pipeline.serving.answer_job import AnswerJob, Event, Failed, Finished, Piece, Started
from mmerge.pipeline.serving.scheduler import BatchSettings, QueueFull, Scheduler
from mmerge.pipeline.serving.server_metrics import ServerMetrics
from mmerge.workers.modalities.prompt import Part


class Asked:
    """A job and the events that it told."""

    def __init__(self, model: Any, text: str, **options: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.ended: list[bool] = []
        self.job = AnswerJob(
            model=model,
            parts=[Part.text(text)],
            tell=self.events.put,
            on_end=lambda: self.ended.append(True),
            **options,
        )

    def wait(self) -> tuple[str, Finished | Failed]:
        """Return the whole text and the last event."""
        text = ""
        while True:
            event = self.events.get(timeout=30)
            if isinstance(event, Piece):
                text += event.text
            if isinstance(event, (Finished, Failed)):
                deadline = time.monotonic() + 5
                while not self.ended and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert self.ended == [True]
                assert self.events.empty()
                return text, event


@pytest.fixture
def model() -> Any:
    return SimpleNamespace(composite=FakeComposite())


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(
        BatchSettings(max_batch=4, max_queue=6, default_new_tokens=50, max_batch_tokens=500),
        metrics=ServerMetrics(),
    )
    yield made
    made.close()


def hold(scheduler: Scheduler, model: Any) -> Asked:
    """Start a job that keeps the scheduler busy until the composite's gate opens."""
    model.composite.gate.clear()
    model.composite.began.clear()
    first = Asked(model, "first")
    scheduler.submit(first.job)
    assert model.composite.began.wait(30)
    return first


def test_prompts_that_wait_are_answered_in_one_batch(scheduler: Scheduler, model: Any) -> None:
    first = hold(scheduler, model)
    others = [Asked(model, f"prompt {index}") for index in range(5)]
    for asked in others:
        scheduler.submit(asked.job)
    model.composite.gate.set()
    assert [asked.wait()[0] for asked in (first, *others)] == [
        "first",
        *(f"prompt {index}" for index in range(5)),
    ]
    assert model.composite.batches == [1, 4, 1]


def test_prompts_with_other_options_or_models_or_a_seed_are_not_mixed(
    scheduler: Scheduler, model: Any
) -> None:
    other_model = SimpleNamespace(composite=FakeComposite())
    first = hold(scheduler, model)
    sampled = {"do_sample": True, "temperature": 0.5}
    jobs = [
        Asked(model, "a"),
        Asked(model, "b", options=sampled | {"seed": 1}),
        Asked(other_model, "c"),
        Asked(model, "d", options=sampled | {"seed": 1}),
        Asked(model, "e", options=sampled),
        Asked(model, "f"),
    ]
    for asked in jobs:
        scheduler.submit(asked.job)
    model.composite.gate.set()
    assert [asked.wait()[0] for asked in (first, *jobs)] == ["first", *"abcdef"]
    assert model.composite.batches == [1, 2, 1, 1, 1]
    assert other_model.composite.batches == [1]
    assert {} in model.composite.options
    assert sampled | {"seed": 1} in model.composite.options


def test_each_answer_of_a_batch_has_its_own_length(scheduler: Scheduler, model: Any) -> None:
    first = hold(scheduler, model)
    jobs = [Asked(model, "abcdefgh", max_new_tokens=count) for count in (3, 100, 8)]
    for asked in jobs:
        scheduler.submit(asked.job)
    model.composite.gate.set()
    first.wait()
    assert [asked.wait() for asked in jobs] == [
        ("abc", Finished("length", 3)),
        ("abcdefgh", Finished("stop", 9)),
        ("abcdefgh", Finished("length", 8)),
    ]
    assert model.composite.batches == [1, 3]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("def",), "abc"),
        (("h", "cd"), "ab"),
        (("xyz", "efgi"), "abcdefgh"),
        (("abcdefgh",), ""),
        (("ghi",), "abcdefgh"),
    ],
)
def test_an_answer_ends_before_a_stop_text(
    scheduler: Scheduler, model: Any, stops: tuple[str, ...], expected: str
) -> None:
    asked = Asked(model, "abcdefgh", stops=stops)
    scheduler.submit(asked.job)
    text, event = asked.wait()
    assert (text, type(event)) == (expected, Finished)


def test_an_input_that_cannot_be_read_fails_its_own_prompt(
    scheduler: Scheduler, model: Any
) -> None:
    first = hold(scheduler, model)
    jobs = [Asked(model, text) for text in ("good", "unreadable", "broken", "fine")]
    for asked in jobs:
        scheduler.submit(asked.job)
    model.composite.gate.set()
    first.wait()
    (good, _), (_, unreadable), (_, broken), (fine, _) = [asked.wait() for asked in jobs]
    assert (good, fine) == ("good", "fine")
    assert isinstance(unreadable, Failed)
    assert isinstance(unreadable.error, PromptError)
    assert isinstance(broken, Failed)
    assert isinstance(broken.error, ZeroDivisionError)
    assert model.composite.batches == [1, 2]


def test_a_fault_of_a_generation_fails_its_batch_and_the_next_is_answered(
    scheduler: Scheduler, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = model.composite.generate_rows

    def fail(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(model.composite, "generate_rows", generate)
        raise MemoryError("no memory")

    monkeypatch.setattr(model.composite, "generate_rows", fail)
    asked = Asked(model, "one")
    scheduler.submit(asked.job)
    _, event = asked.wait()
    assert isinstance(event, Failed)
    assert isinstance(event.error, MemoryError)
    again = Asked(model, "two")
    scheduler.submit(again.job)
    assert again.wait()[0] == "two"


def test_a_full_queue_refuses_and_those_who_left_take_no_place(
    scheduler: Scheduler, model: Any
) -> None:
    first = hold(scheduler, model)
    jobs = [Asked(model, str(index)) for index in range(6)]
    for asked in jobs:
        scheduler.submit(asked.job)
    with pytest.raises(QueueFull):
        scheduler.submit(Asked(model, "too many").job)
    jobs[2].job.cancel()
    late = Asked(model, "late")
    scheduler.submit(late.job)
    model.composite.gate.set()
    assert first.wait()[0] == "first"
    assert late.wait()[0] == "late"
    text, event = jobs[2].wait()
    assert text == ""
    assert isinstance(event, Failed)
    assert sum(model.composite.batches) == 1 + 6


def test_an_answer_whose_client_left_ends_with_the_next_token(
    scheduler: Scheduler, model: Any
) -> None:
    model.composite.step_s = 0.005
    asked = Asked(model, "x" * 3000, max_new_tokens=900)
    scheduler.submit(asked.job)
    assert isinstance(asked.events.get(timeout=30), Started)
    assert isinstance(asked.events.get(timeout=30), Piece)
    asked.job.cancel()
    asked.wait()
    assert model.composite.num_steps < 900


def test_prompts_that_are_too_long_together_are_answered_one_after_the_other(
    scheduler: Scheduler, model: Any
) -> None:
    first = hold(scheduler, model)
    jobs = [
        Asked(model, "x" * 3900, max_new_tokens=50),
        Asked(model, "y" * 10, max_new_tokens=3900),
        Asked(model, "z" * 200, max_new_tokens=10),
    ]
    for asked in jobs:
        scheduler.submit(asked.job)
    model.composite.gate.set()
    first.wait()
    assert [asked.wait()[0] for asked in jobs] == ["x" * 50, "y" * 10, "z" * 10]
    assert model.composite.batches == [1, 1, 1, 1]


def test_a_length_that_is_left_open_fits_into_the_context(scheduler: Scheduler, model: Any) -> None:
    asked = Asked(model, "x" * 3990)
    scheduler.submit(asked.job)
    assert asked.wait()[1] == Finished("length", 10)
    full = Asked(model, "x" * 4000)
    scheduler.submit(full.job)
    _, event = full.wait()
    assert isinstance(event, Failed)
    assert "4000 + 1 tokens are too many" in str(event.error)


def test_jobs_that_wait_when_the_server_ends_fail(model: Any) -> None:
    scheduler = Scheduler(BatchSettings(), metrics=ServerMetrics())
    first = hold(scheduler, model)
    waiting = Asked(model, "waiting", options={"top_k": 1})
    scheduler.submit(waiting.job)
    scheduler._is_closed = True
    model.composite.gate.set()
    scheduler.close()
    assert first.wait()[0] == "first"
    assert isinstance(waiting.wait()[1], Failed)
    with pytest.raises(QueueFull):
        scheduler.submit(Asked(model, "late").job)
