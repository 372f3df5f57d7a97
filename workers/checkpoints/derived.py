"""Checkpoints made of others: tensors under new names, another configuration, replaced files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.quantization import has_quantization, without_quantization
from mmerge.workers.checkpoints.sources import TensorSource


@dataclass(frozen=True)
class Changes:
    """What a derived checkpoint has in place of its origin's; None keeps the origin's."""

    tensors: Mapping[str, TensorSource] | None = None
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    """Small files by name; None removes one."""


class DerivedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are those of one or several others, rearranged.

    To every reader it is a checkpoint like those in folders: its configuration and tokenizer
    describe its tensors.
    """

    def __init__(
        self, origin: Checkpoint, changes: Changes, *, parts: Sequence[Checkpoint] = ()
    ) -> None:
        """Change a checkpoint.

        Args:
            origin: whatever does not change is its own.
            changes: what does.
            parts: the checkpoints that the tensors come from, if not the origin alone.
        """
        self.uri = origin.uri
        self.owner = origin.owner
        self._origin = origin
        self._changes = changes
        self._parts = tuple(parts) or (origin,)
        self._store = origin._store
        self.config = dict(origin.config if changes.config is None else changes.config)
        tensors = origin.tensors if changes.tensors is None else changes.tensors
        self.tensors = dict(sorted(tensors.items()))

    @property
    @override
    def parts(self) -> tuple[Checkpoint, ...]:
        """The checkpoints in folders that the tensors are read from, each once."""
        return tuple(dict.fromkeys(part for whole in self._parts for part in whole.parts))

    @property
    @override
    def identity(self) -> dict[str, str]:
        """As in Checkpoint, of the origin alone: those of the others are those of `parts`."""
        return self._origin.identity

    @override
    def read_small_files(self) -> dict[str, bytes]:
        """Return the origin's small files with the changes."""
        files = self._origin.read_small_files()
        for name, data in self._changes.files.items():
            if data is None:
                files.pop(name, None)
            else:
                files[name] = data
        if self._changes.config is not None:
            config = self.config
            plain = without_quantization(config) if has_quantization(config) else config
            files["config.json"] = json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"
        return files

    @override
    def read_small_file(self, name: str) -> bytes | None:
        """See Checkpoint: a changed file as it is now."""
        if name in self._changes.files:
            return self._changes.files[name]
        if name == "config.json" and self._changes.config is not None:
            return json.dumps(self.config, indent=2, sort_keys=True).encode() + b"\n"
        return self._origin.read_small_file(name)
