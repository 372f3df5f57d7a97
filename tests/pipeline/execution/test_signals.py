"""Steps that a signal must not tear apart, and what becomes of the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from mmerge.pipeline.execution.signals import uninterrupted


class Stopped(BaseException):
    """What the handler of SIGTERM raises here."""


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]
)
def test_a_signal_waits_for_the_end_of_the_step_and_is_then_handled_as_always(
    number: signal.Signals, error: type[BaseException]
) -> None:
    steps = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(number)
            steps.append("whole")
        steps.append("after")

    before = signal.getsignal(number)
    with pytest.raises(error):
        work()
    assert steps == ["whole"]
    assert signal.getsignal(number) is before


def test_an_error_of_the_step_is_what_the_caller_sees_and_handlers_are_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="step"), uninterrupted():
        raise ValueError("step")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_threads_that_no_signal_interrupts_may_use_it_too() -> None:
    steps = []

    def work() -> None:
        with uninterrupted():
            steps.append("whole")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps == ["whole"]
