"""What a worker process does before its first task; nothing that is large is imported here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading

from mmerge.workers.lazy_torch import postpone_torch


def begin_process() -> None:
    """Prepare this process for tasks: it lives no longer than its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; what runs is finished, and the parent says when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what came from the parent stays as it is, and so do the pages that both share
    postpone_torch(num_threads=1)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
