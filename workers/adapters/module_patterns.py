"""Regular expressions of LoRA adapters, matched as PEFT does but within bounds on time.

An adapter's configuration is data of whoever made it, and Python's engine backtracks: a pattern of
ten characters can take years. The `regex` library, which transformers uses too, stops in time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import regex  # type: ignore[import-untyped, unused-ignore]

from mmerge.manifests import limits
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.pattern_checks import find_costly_part

MATCH_SECONDS = 5.0
"""For all patterns and modules of one adapter together, which usually take milliseconds."""
MAX_MODULE_CHARACTERS = 1000


class ModulePatterns:
    """Looks up what an adapter's configuration says for a module; `where` begins every error."""

    def __init__(self, *, where: str) -> None:
        self._where = where
        self._remaining_seconds = MATCH_SECONDS

    def find(self, config: Mapping[str, Any], key: str, *, module: str, default: Any) -> Any:
        """Return the value of the first pattern under `key` that matches a module, else `default`.

        A pattern matches a module's path, or its end after a dot, as in PEFT; one that is no
        regular expression matches nothing.

        Raises:
            CheckpointError: the patterns are too many, too long or too slow.
        """
        patterns = config.get(key)
        if not isinstance(patterns, dict):
            return default
        where = f"{self._where}: {key}"
        limits.PATTERNS.check(len(patterns), where=where, error=CheckpointError)
        for pattern, value in patterns.items():
            if self._matches(pattern, module, where=where):
                return value
        return default

    def _matches(self, pattern: str, module: str, *, where: str) -> bool:
        limits.PATTERN_CHARACTERS.check(len(pattern), where=where, error=CheckpointError)
        if len(module) > MAX_MODULE_CHARACTERS:
            raise CheckpointError(
                f"{where}: a module's path has {len(module):,} characters, at most"
                f" {MAX_MODULE_CHARACTERS:,} are matched: {module[:100]}…"
            )
        costly = find_costly_part(pattern)
        if costly:
            raise CheckpointError(
                f"{where}: the pattern {pattern!r} repeats {costly!r}, which itself repeats or"
                " branches: matching could take years. Rewrite it without nesting"
            )
        began = time.monotonic()
        try:
            compiled = regex.compile(rf"(?:.*\.)?(?:{pattern})$", cache_pattern=False)
            return compiled.match(module, timeout=self._remaining_seconds) is not None
        except TimeoutError as error:
            raise CheckpointError(
                f"{where}: the patterns take more than {MATCH_SECONDS:g} s, the last is {pattern!r}"
                f" on {module}. Write the modules' names instead"
            ) from error
        except (regex.error, RecursionError, MemoryError, OverflowError):
            return False
        finally:
            self._remaining_seconds = max(0.001, self._remaining_seconds - time.monotonic() + began)
