"""Steps that Ctrl-C or SIGTERM must not tear apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the context ends, which is to be short, then handle the
    last of them as always.

    Python raises what a signal means between any two steps of the main thread: a task could be
    begun and never noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {}
    for number in _INTERRUPTS:
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
    with ExitStack() as restored:  # all of them, even if a signal arrives between two
        for number, handler in handlers.items():
            restored.callback(signal.signal, number, handler)
            signal.signal(number, lambda *call: received.append(call))
        yield
    for call in received[-1:]:
        handlers[signal.Signals(call[0])](*call)
