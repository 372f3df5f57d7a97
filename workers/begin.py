"""What a worker process does before its first task; nothing that is large is imported here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from types import ModuleType

from mmerge.workers.lazy_torch import postpone_torch


def begin_process() -> None:
    """Prepare this process for tasks: it lives no longer than its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; what runs is finished, and the parent says when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what came from the parent stays as it is, and so do the pages that both share
    postpone_torch(num_threads=1)
    leave_out_scipy()
    _load_kernels()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def leave_out_scipy() -> None:
    """Let numba begin without SciPy, half of its start: it looks there for the BLAS behind `np.dot`, which no kernel calls.

    For processes that are ours alone: compiled code of others could not call `np.dot` afterwards.
    """
    hidden: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None is how the import system marks what must not be found
    if "scipy" in hidden:
        return
    hidden["scipy"] = None
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del hidden["scipy"]


def _load_kernels() -> None:
    """Let numba load what any kernel needs, while the parent plans."""
    import numpy as np

    from mmerge.workers.kernels_survey import first_non_finite

    value = np.zeros(1, np.float32)
    first_non_finite(value.ctypes.data, 0, 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
