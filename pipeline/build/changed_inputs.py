"""Inputs that change while a build runs: what is scanned again, and when that is an error.

Three rules keep a build consistent:

1. A shard whose task reads other bytes than its scan did is scanned again, once per run. Where that
   gives the earlier digests, the task's own read was wrong, and it runs again.
2. Where it gives other digests, or the file was replaced, other shards may depend on the earlier
   ones as well (thresholds of the whole model, copies of the same tensor, the record of the input).
   So the run goes through the whole build again: all that did not change is found in the store.
   If the store's identity of the file does not tell its versions apart, no stored scan of the file
   is used.
3. A shard that differs once more ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mmerge.manifests.errors import CheckpointError, NotFound
from mmerge.manifests.stores.open import open_readable_store
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.checkpoints.input_digests import ChangedInput, stored_parts
from mmerge.workers.task import ScanTask

log = logging.getLogger("mmerge.run")


class ScanOutdated(Exception):
    """Ends the build of a shard: its scan, and all that follows from it, must be made again."""

    def __init__(self, scans: Sequence[ScanTask] = ()) -> None:
        """Take the scans whose stored results are no longer true of any file."""
        super().__init__()
        self.scans = tuple(scans)


@dataclass(frozen=True)
class Rescans:
    """What was found to have changed during one run, over all of its passes."""

    plan: MergePlan
    _shards: set[str] = field(default_factory=set)
    _unreliable: set[tuple[str, str]] = field(default_factory=set)
    """URI and file of those whose bytes changed, and whose identities did not."""

    def note(self, shard: str, change: ChangedInput) -> None:
        """Note that the inputs of a shard must be scanned again.

        Raises:
            CheckpointError: they have been scanned again before.
        """
        owners = [
            checkpoint.owner
            for checkpoint in self.plan.checkpoints
            if change.source.uri in {part.uri for part in checkpoint.parts}
        ]
        message = ": ".join([*owners[:1], change.describe()])
        if shard in self._shards:
            raise CheckpointError(
                f"{message}. It had been scanned again already: something writes to the file, or"
                " disk or network return other bytes at every read. Run again when nothing writes"
                " to it; if it stays so, fetch the checkpoint again"
            )
        self._shards.add(shard)
        log.warning("%s: %s. Scanning it again", shard, message)

    @property
    def is_any(self) -> bool:
        """Whether the inputs of any shard were scanned again."""
        return bool(self._shards)

    def has(self, shard: str) -> bool:
        """Return whether the inputs of a shard were scanned again."""
        return shard in self._shards

    def distrust(self, change: ChangedInput) -> None:
        """Use no stored scan of the files of an input: they may be of other versions."""
        self._unreliable.update((part.uri, part.file) for part in stored_parts(change.source))

    def may_be_stored(self, places: Iterable[tuple[str, str]]) -> bool:
        """Return whether a stored scan of these files (URI and file) may be used."""
        return self._unreliable.isdisjoint(places)


def is_replaced(scan: ScanTask) -> bool:
    """Return whether a file of a scan is gone, or no longer the one that was to be scanned."""
    try:
        return any(
            open_readable_store(uri).identity(file) != identity
            for uri, file, identity in scan.identities
        )
    except NotFound:
        return True
