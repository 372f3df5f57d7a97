"""Which expert reads an input: the one that its kind names, or the first of its modality."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mmerge.manifests.errors import PromptError
from mmerge.workers.modalities.encoders import Encoder

log = logging.getLogger("mmerge.composite")


class ExpertChoice:
    """The experts of a loaded composite, by the kinds of inputs that they read."""

    def __init__(self, encoders: Mapping[str, Encoder], expert: str | None) -> None:
        """Keep the encoders by expert, in recipe order; `expert` is the one rebuilt alone."""
        self._encoders, self._expert = encoders, expert
        self._logged: set[str] = set()

    def find(self, kind: str) -> str:
        """Return the expert of a part of this kind, see `Composite.find_expert`."""
        if kind in self._encoders:
            return kind
        matches = [name for name, encoder in self._encoders.items() if encoder.modality == kind]
        if not matches:
            raise PromptError(self._describe_missing(kind))
        if len(matches) > 1 and kind not in self._logged:
            self._logged.add(kind)
            log.warning(
                "%s: %d experts read this modality; its inputs go to the first one, %r, unless"
                " their kind names another: %s",
                kind,
                len(matches),
                matches[0],
                ", ".join(matches[1:]),
            )
        return matches[0]

    def _describe_missing(self, kind: str) -> str:
        loaded = [f"{name} ({encoder.modality})" for name, encoder in self._encoders.items()]
        hint = f" Only expert {self._expert!r} is loaded in retention mode." if self._expert else ""
        return (
            f"no expert for modality {kind!r}; this composite has {', '.join(loaded) or 'none'}."
            f"{hint}"
        )
