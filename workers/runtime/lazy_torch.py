"""Deferred import of torch: it takes longer than many merges, and compiled methods never use it.

The command line puts a placeholder module where `import torch` finds it; the first access to an
attribute imports torch. Python's own `importlib.util.LazyLoader` does the same, but before 3.12 two
threads that use the module at once may see it half initialised.

Only modules of method definitions and tasks rely on it: they are imported by compiled methods too,
for their parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_NAME = "torch"
_lock = threading.RLock()


def postpone_torch(*, num_threads: int) -> None:
    """Import torch when it is first used, and set its number of threads then.

    Has no effect where torch is imported already.
    """
    if _NAME not in sys.modules:
        spec = importlib.util.find_spec(_NAME)
        if spec is not None:
            sys.modules[_NAME] = _Placeholder(spec, num_threads)


def torch_is_loaded() -> bool:
    """Return whether torch itself is imported, not its placeholder alone."""
    module = sys.modules.get(_NAME)
    return module is not None and not isinstance(module, _Placeholder)


class _Placeholder(ModuleType):
    def __init__(self, spec: Any, num_threads: int) -> None:
        super().__init__(_NAME)
        self.__spec__, self.__file__ = spec, spec.origin
        self._num_threads = num_threads

    def __getattr__(self, name: str) -> Any:
        # Imports of submodules lead here too: the import system asks the parent for __path__.
        with _lock:
            if sys.modules.get(_NAME) is self:
                del sys.modules[_NAME]
                importlib.import_module(_NAME).set_num_threads(self._num_threads)
        return getattr(sys.modules[_NAME], name)
