"""What a worker process does before its first task; nothing that is large is imported here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from mmerge.workers.runtime.lazy_torch import postpone_torch

_NO_KERNEL_NEEDS = ("cffi", "scipy")
"""What numba looks for as it begins: half of its start. SciPy for the BLAS behind `np.dot`, cffi
for functions that others compiled.
"""


def begin_process() -> None:
    """Prepare this process for tasks: it ends with its parent, which handles Ctrl-C."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends it to all; what runs is finished, and the parent says when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what came from the parent stays as it is, and so do the pages that both share
    postpone_torch(num_threads=1)
    load_kernels()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def import_numba() -> None:
    """Import numba without what no kernel needs, and NumPy without threads: nothing here calls its
    linear algebra.

    For processes that are ours alone: compiled code of others could not call `np.dot` afterwards.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with _hidden(_NO_KERNEL_NEEDS):
        import numba  # noqa: F401


def load_kernels() -> None:
    """Let numba load what any kernel needs. Processes that are forked afterwards share it. As
    `import_numba`, for processes of ours.
    """
    import_numba()
    import numpy as np

    from mmerge.workers.kernels.magnitudes import first_non_finite

    value = np.zeros(1, np.float32)
    with _hidden(_NO_KERNEL_NEEDS):
        first_non_finite(value.ctypes.data, 0, 1)


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Let these modules not be found while the context lasts, those that were imported before
    excepted.
    """
    # The import system takes None for a module that must not be found.
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    missing = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(missing))
    try:
        yield
    finally:
        for name in missing:
            del modules[name]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
