"""Damages of a build: what differs, under which key, and how they become one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import REPAIR, DamagedObject

MAX_SHOWN = 20
"""Damages that an error lists; the others are counted."""


@dataclass(frozen=True)
class Damage:
    """One difference between a stored object and what the build says of it."""

    key: str
    """Key of the object, entry, file, table, manifest or reference."""
    sentence: str
    """What differs, with the key and both sides."""

    @property
    def object_digest(self) -> str:
        """The DIGEST in the key of an object or an entry; that of any other key is none's."""
        return self.key.rpartition("/")[2].partition(".")[0]


def make_error(where: str, sentences: Sequence[str], *, remedy: str = REPAIR) -> DamagedObject:
    """Return one error for all damages of the build or store at `where`."""
    lines = [*sentences[:MAX_SHOWN]]
    if len(sentences) > len(lines):
        lines.append(f"… and {len(sentences) - len(lines)} more")
    shown = "\n  ".join(lines)
    return DamagedObject(f"{where}: {len(sentences)} damaged:\n  {shown}\n{remedy}")
