"""Critical sections that SIGINT and SIGTERM must not interrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the context ends, then run the handler of the last one.

    A Python signal handler may raise between any two bytecode instructions of the main thread: a
    task could be started and never recorded. Keep the context short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers run only in the main thread
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {}
    for number in _INTERRUPTS:
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
    with ExitStack() as restored:  # restores all handlers, even if a signal arrives in between
        for number, handler in handlers.items():
            restored.callback(signal.signal, number, handler)
            signal.signal(number, lambda *call: received.append(call))
        yield
    for call in received[-1:]:
        handlers[signal.Signals(call[0])](*call)
