"""Start-up of a worker process, before its first task. No large module is imported here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading

from mmerge.workers.runtime.lazy_torch import postpone_torch


def start_worker() -> None:
    """Prepare this process for tasks: it ends with its parent, and ignores Ctrl-C."""
    # A terminal sends SIGINT to the whole process group. The task at hand is finished, and the
    # parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Objects of the parent are never collected here: a collection would write to their pages, which
    # both processes share.
    gc.freeze()
    # Only methods without a kernel use torch, whose import costs more than most tasks do.
    postpone_torch(num_threads=1)
    load_kernels()
    threading.Thread(target=_exit_with_parent, name="mmerge-parent", daemon=True).start()


def load_kernels() -> None:
    """Import numba and load a kernel. Processes that are forked afterwards share both."""
    # NumPy starts a thread per core for linear algebra, which no kernel uses.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import numpy as np

    from mmerge.workers.kernels.magnitudes import first_non_finite

    value = np.zeros(1, np.float32)
    first_non_finite(value.ctypes.data, 0, 1)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
