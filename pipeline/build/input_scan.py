"""The first pass over the inputs: its tasks, and the digests that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.manifest import FileEntry
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.workers.checkpoints.input_digests import stored_parts
from mmerge.workers.checkpoints.sources import TensorSource, identity_digest
from mmerge.workers.task import (
    CopyTensor,
    ScannedChecksums,
    ScannedDigests,
    ScannedRows,
    ScanTask,
    TensorTask,
)
from mmerge.workers.tasks.scan_cache import ScanResult, piece_name

SCAN_VERSION = 2
"""Raised when the contents of a stored scan change: no older scan is then reused."""


Piece = TensorTask | CopyTensor | ScannedRows
"""Some rows of a tensor."""


def share_rows(first: Piece, second: Piece) -> bool:
    """Return whether two pieces of one tensor have rows in common; tensors without rows do."""
    if first.row_start == second.row_start:
        return True
    return first.row_start < second.row_stop and second.row_start < first.row_stop


@dataclass(frozen=True)
class InputDigests:
    """Digests of every piece of the inputs that has been scanned."""

    merged: dict[str, list[str]] = field(default_factory=dict)
    """By piece of a merged tensor: of the base first, then of the experts."""
    copied: dict[tuple[str, str], dict[int, ScannedRows]] = field(default_factory=dict)
    """By expert (empty for the base) and tensor name: the pieces by first row."""
    checksums: dict[str, list[str]] = field(default_factory=dict)
    """By piece of a merged tensor: the checksums of the same scan, where it has some."""
    _scanned: set[tuple[str, str]] = field(default_factory=set)
    """Key and expert of the scans whose digests are here."""

    def add(self, task: ScanTask, scan: ScanResult, *, expert: str) -> None:
        """Add the digests of one scan; `expert` owns the tensors that it only copies."""
        self._scanned.add((task.key, expert))
        for tensor in task.tensors:
            piece = piece_name(tensor.name, tensor.row_start)
            self.merged[piece] = scan.digests[piece]
            self.checksums[piece] = scan.checksums.get(piece, [])
            self._add_copied("", tensor, piece, scan)
        for copy in task.copies:
            piece = piece_name(f"{copy.role}/{copy.name}", copy.row_start)
            self._add_copied(expert, copy, piece, scan)

    def _add_copied(
        self, expert: str, tensor: TensorTask | CopyTensor, piece: str, scan: ScanResult
    ) -> None:
        digest, checksums = scan.digests[piece][0], scan.checksums.get(piece, [""])
        rows = ScannedRows(tensor.row_start, tensor.row_stop, digest, checksums[0])
        self.copied.setdefault((expert, tensor.name), {})[tensor.row_start] = rows

    def has(self, task: ScanTask, *, expert: str) -> bool:
        """Return whether the digests of a scan are here."""
        return (task.key, expert) in self._scanned

    def has_equal(self, task: ScanTask, scan: ScanResult, *, expert: str) -> bool:
        """Return whether a repeated scan found the digests that are here."""
        repeated = InputDigests()
        repeated.add(task, scan, expert=expert)
        if any(self.merged.get(piece) != digests for piece, digests in repeated.merged.items()):
            return False
        return all(
            self.copied.get(tensor, {}).get(row_start) == rows
            for tensor, pieces in repeated.copied.items()
            for row_start, rows in pieces.items()
        )

    def of_tensors(self, tensors: Sequence[TensorTask]) -> ScannedDigests:
        """Return per piece the digests of base and experts, with which its tasks compare."""
        return tuple(
            tuple(self.merged[piece_name(tensor.name, tensor.row_start)]) for tensor in tensors
        )

    def checksums_of(self, tensors: Sequence[TensorTask]) -> ScannedChecksums:
        """Return per piece the checksums of base and experts; empty where a scan has none."""
        checksums = [
            self.checksums[piece_name(tensor.name, tensor.row_start)] for tensor in tensors
        ]
        return tuple(map(tuple, checksums)) if all(checksums) else ()

    def describe(self, tensor: TensorTask) -> list[list[str]]:
        """Return dtype and digest of a piece in base and experts: what its merge depends on."""
        sources = (tensor.base, *tensor.experts)
        digests = self.merged[piece_name(tensor.name, tensor.row_start)]
        return [
            [source.spec.dtype, digest] for source, digest in zip(sources, digests, strict=True)
        ]

    def identify(self, shard: CopyShard, tensor: CopyTensor) -> str | list[list[int | str]]:
        """Return what the bytes of a copied piece follow from.

        That is its digest where exactly its rows were scanned as one piece. Merged tensors are
        scanned in smaller pieces, whose bounds need not be those of the copies: then it is the
        first row and the digest of every scanned piece that has some of the rows.

        Raises:
            LookupError: some of the rows have not been scanned.
        """
        pieces = self.pieces_of(shard, tensor)
        if (pieces[0].row_start, pieces[0].row_stop) == (tensor.row_start, tensor.row_stop):
            return pieces[0].digest
        return [[piece.row_start, piece.digest] for piece in pieces]

    def pieces_of(self, shard: CopyShard, tensor: CopyTensor) -> tuple[ScannedRows, ...]:
        """Return the scanned pieces that hold the rows of a copied piece, in order.

        Raises:
            LookupError: some of the rows have not been scanned.
        """
        pieces = self.copied.get((shard.expert, tensor.name), {})
        exact = pieces.get(tensor.row_start)
        if exact is not None and exact.row_stop == tensor.row_stop:
            return (exact,)
        next_row = tensor.row_start
        holding: list[ScannedRows] = []
        for _, piece in sorted(pieces.items()):
            if not share_rows(piece, tensor):
                continue
            if piece.row_start > next_row:
                break
            holding.append(piece)
            next_row = piece.row_stop
        if next_row < tensor.row_stop:
            raise LookupError(
                f"{shard.name}: {tensor.name}: rows {next_row} to {tensor.row_stop} are copied"
                " before they are scanned"
            )
        return tuple(holding)

    def revision(self, position: int, expert: str, files: Sequence[FileEntry]) -> str:
        """Return the digest of a whole checkpoint.

        Args:
            position: 0 for the base, i + 1 for expert i of the recipe.
            expert: its name, empty for the base.
            files: its small files.
        """
        shared = {piece: digests[position] for piece, digests in self.merged.items()}
        copied = {
            piece_name(name, piece.row_start): piece.digest
            for (owner, name), pieces in self.copied.items()
            if owner == expert
            for piece in pieces.values()
        }
        return digest_json([shared, copied, [[file.name, file.digest] for file in files]])


def make_scan_tasks(
    plan: MergePlan,
    identities: dict[str, dict[str, str]],
    *,
    magnitudes: bool,
    fresh: bool,
) -> dict[str, ScanTask]:
    """Return the scan tasks of a plan by shard.

    Their keys follow from the identity of the files, so that unchanged files are not read again.
    A copy shard whose tensors are all merged as well has none: the merge shards' scans cover it.

    Args:
        plan: what will be merged and copied.
        identities: per checkpoint and file a text that changes when the file is replaced.
        magnitudes: whether histograms of the task vectors are needed.
        fresh: scan again, whatever is in the store.
    """
    factory = _ScanTaskFactory(plan, identities, magnitudes, fresh)
    tasks = {shard.name: factory.make_merge_scan(shard) for shard in plan.merge_shards}
    merged = {tensor.name for shard in plan.merge_shards for tensor in shard.tensors}
    for copy_shard in plan.copy_shards:
        copies = tuple(
            copy
            for copy in copy_shard.tensors
            if copy_shard.role == "carry" or copy.name not in merged
        )
        if copies:
            tasks[copy_shard.name] = factory.make_copy_scan(copy_shard, copies)
    return tasks


@dataclass(frozen=True)
class _ScanTaskFactory:
    plan: MergePlan
    identities: dict[str, dict[str, str]]
    magnitudes: bool
    fresh: bool

    def make_merge_scan(self, shard: MergeShard) -> ScanTask:
        pieces: list[list[str | int]] = []
        sources = []
        for tensor in shard.tensors:
            pieces.append([tensor.name, tensor.row_start])
            sources.append([self._place(source) for source in (tensor.base, *tensor.experts)])
        return ScanTask(
            key=self._key(self.magnitudes, pieces, sources),
            shard=shard.name,
            expert_names=self._expert_names(),
            tensors=shard.tensors,
            copies=(),
            copies_owner="",
            identities=self._identities_of(
                [source for tensor in shard.tensors for source in (tensor.base, *tensor.experts)]
            ),
            magnitudes=self.magnitudes,
            non_finite=self.plan.recipe.non_finite,
            block_entries=self.plan.block_entries,
            num_bytes=shard.bytes_in,
            peak_bytes=shard.peak_bytes,
            fresh=self.fresh,
        )

    def make_copy_scan(self, shard: CopyShard, copies: tuple[CopyTensor, ...]) -> ScanTask:
        # The digests lie under the role as well: base and expert may copy one tensor of one file.
        pieces: list[list[str | int]] = [
            [f"{copy.role}/{copy.name}", copy.row_start] for copy in copies
        ]
        sources = [[self._place(copy.source)] for copy in copies]
        return ScanTask(
            key=self._key(False, pieces, sources),
            shard=shard.name,
            expert_names=self._expert_names(),
            tensors=(),
            copies=copies,
            copies_owner=f"expert {shard.expert!r}" if shard.expert else "base",
            identities=self._identities_of([copy.source for copy in copies]),
            magnitudes=False,
            non_finite=self.plan.recipe.non_finite,
            block_entries=self.plan.block_entries,
            num_bytes=sum(copy.source.spec.num_bytes for copy in copies),
            peak_bytes=shard.peak_bytes,
            fresh=self.fresh,
        )

    def _identities_of(self, sources: Sequence[TensorSource]) -> tuple[tuple[str, str, str], ...]:
        parts = [part for source in sources for part in stored_parts(source)]
        places = dict.fromkeys((part.uri, part.file) for part in parts)
        return tuple((uri, file, self.identities[uri][file]) for uri, file in places)

    def _expert_names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.plan.recipe.experts)

    def _key(
        self, magnitudes: bool, pieces: list[list[str | int]], sources: list[list[str]]
    ) -> str:
        return digest_json([SCAN_VERSION, magnitudes, self.plan.recipe.non_finite, pieces, sources])

    def _place(self, source: TensorSource) -> str:
        return identity_digest(self.identities, source)
