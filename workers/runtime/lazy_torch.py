"""Torch when it is first used: importing it takes longer than many merges, and compiled paths never
need it.

The command line puts a stand-in where `import torch` finds it. Its first attribute imports the real
module. Python's own `importlib.util.LazyLoader` does the same, but before 3.12 two threads that
need the module at once may see half of it.
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
    """Import torch only when it is used, and let it then use so many threads. Nothing happens where
    it was imported before.
    """
    if _NAME not in sys.modules:
        spec = importlib.util.find_spec(_NAME)
        if spec is not None:
            sys.modules[_NAME] = _Later(spec, num_threads)


def torch_is_loaded() -> bool:
    """Return whether torch was imported, and is more than a stand-in."""
    found = sys.modules.get(_NAME)
    return found is not None and not isinstance(found, _Later)


class _Later(ModuleType):
    def __init__(self, spec: Any, num_threads: int) -> None:
        super().__init__(_NAME)
        self.__spec__, self.__file__ = spec, spec.origin
        self._num_threads = num_threads

    def __getattr__(self, name: str) -> Any:
        # Submodules, too, lead here: the import system asks their parent for __path__.
        with _lock:
            if sys.modules.get(_NAME) is self:
                del sys.modules[_NAME]
                importlib.import_module(_NAME).set_num_threads(self._num_threads)
        return getattr(sys.modules[_NAME], name)
