"""Compiled passes of the methods that locate and combine, whatever rules they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.interface import CompiledPass, MaskPass, PassRequest, ReadBlocks
from mmerge.workers.kernels.della import merge_by_row
from mmerge.workers.kernels.locate import LOCATE_RULE, TIES, merge_located
from mmerge.workers.kernels.masks import (
    SIGNIFICANT_SHORT,
    MaskRecord,
    merge_consensus,
    merge_with_masks,
)
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods.locate_rules import DropByRank, KeepTop, LocateRule
from mmerge.workers.methods.locate_then_mask import LocateThenMask
from mmerge.workers.methods.locate_then_merge import LocateAndCombine
from mmerge.workers.methods.mask_rules import MaskRule, Significant, is_short
from mmerge.workers.methods.tall import Consensus
from mmerge.workers.statistics.magnitude_histograms import (
    Histogram,
    MagnitudeCounter,
    count_lower,
    find_top,
)


class LocateRecords:
    """The locate rules of one tensor as a kernel reads them."""

    def __init__(self, rules: Sequence[LocateRule]) -> None:
        self._rules = rules
        self.records = np.zeros(len(rules), LOCATE_RULE)
        self.ties = np.zeros((len(rules), 2), TIES)
        # torch casts a factor beyond float32 to Inf as well, without a warning.
        with np.errstate(over="ignore"):
            for record, rule in zip(self.records, rules, strict=True):
                assert rule.kind is not None
                record["kind"] = rule.kind
                for field, value in rule.record().items():
                    record[field] = value

    def find_thresholds(self, read_blocks: ReadBlocks) -> bool:
        """Find the thresholds of rules by exact counts, in one pass over the tensor or two; return
        False where a task vector is not finite.
        """
        tops = [(index, rule) for index, rule in enumerate(self._rules) if _is_top(rule)]
        if not tops:
            return True
        counter = MagnitudeCounter(len(self._rules))
        for block in read_blocks():
            counter.add(block)
        if not counter.is_finite():
            return False
        histograms = counter.drain()
        self.ties["seen"] = 0
        for index, rule in tops:
            assert isinstance(rule, KeepTop)

            def refine(bin_number: int, index: int = index) -> Histogram:
                blocks = (block.of_expert(index) for block in read_blocks())
                return count_lower(blocks, bin_number=bin_number)

            counts = {"threshold": rule.num_largest, "upper_threshold": rule.num_outliers}
            for place, (field, count) in enumerate(counts.items()):
                threshold, num_ties = find_top(histograms[index], count, refine=refine)
                self.records[index][field] = threshold
                self.ties[index, place]["belonging"] = num_ties
        return True


def _is_top(rule: LocateRule) -> bool:
    return isinstance(rule, KeepTop)


class LocatedPass(CompiledPass):
    """θ₀ + λ·F(…) for rules that locate entry by entry."""

    def __init__(
        self, request: PassRequest, method: LocateAndCombine, rules: Sequence[LocateRule]
    ) -> None:
        self._locate = LocateRecords(rules)
        parameters, experts = request.parameters, request.experts
        combine = method.combining.rule(request.tensor, parameters, experts)
        self._combine = combine.record(scale=method.combining.scale(parameters))
        self._start, self._code = request.start, request.code

    @override
    def prepare(self, read_blocks: ReadBlocks) -> bool:
        return self._locate.find_thresholds(read_blocks)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_located(
            block.addresses,
            block.codes,
            block.num_entries,
            np.uint64(self._start + block.start),
            self._locate.records,
            self._locate.ties,
            self._combine,
            self._code,
            out,
        )


class RowPass(LocatedPass):
    """θ₀ + λ·F(…) for rules that locate by rank within the row."""

    by_row = True

    def __init__(
        self, request: PassRequest, method: LocateAndCombine, rules: Sequence[LocateRule]
    ) -> None:
        super().__init__(request, method, rules)
        self._columns = request.columns

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_by_row(
            block.addresses,
            block.codes,
            block.num_entries,
            np.uint64(self._start + block.start),
            self._columns,
            self._locate.records,
            self._combine,
            self._code,
            out,
        )


class LocatedMaskPass(MaskPass):
    """τ⋆ = F(…) and a mask per expert."""

    def __init__(
        self, request: PassRequest, method: LocateThenMask, rules: Sequence[LocateRule]
    ) -> None:
        super().__init__(len(rules))
        self._locate = LocateRecords(rules)
        parameters, experts = request.parameters, request.experts
        combine = method.combining.rule(request.tensor, parameters, experts)
        self._combine = combine.record(scale=1.0)
        self._masks = make_mask_record(method.masking.rules(parameters, experts), request.code)
        self._start, self._code = request.start, request.code

    @override
    def prepare(self, read_blocks: ReadBlocks) -> bool:
        return self._locate.find_thresholds(read_blocks)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_with_masks(
            block.addresses,
            block.codes,
            block.num_entries,
            np.uint64(self._start + block.start),
            self._locate.records,
            self._locate.ties,
            self._combine,
            self._masks,
            self._code,
            out,
            masks,
            block.start // 8,
            self.statistics,
        )


class ConsensusPass(LocatedPass):
    """θ₀ + α·m∘F(…), m the entries that enough masks hold."""

    def __init__(
        self, request: PassRequest, method: Consensus, rules: Sequence[LocateRule]
    ) -> None:
        super().__init__(request, method, rules)
        # The masks of a consensus are those of the merged task vector in float32.
        rules_of_masks = method.masking.rules(request.parameters, request.experts)
        self._masks = make_mask_record(rules_of_masks, CODES["F32"])
        self._agreement = request.parameters.agreement
        self._scale = np.float32(request.parameters.scale)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_consensus(
            block.addresses,
            block.codes,
            block.num_entries,
            np.uint64(self._start + block.start),
            self._locate.records,
            self._locate.ties,
            self._combine,
            self._masks,
            self._agreement,
            self._scale,
            self._code,
            out,
        )


def make_mask_record(rules: Sequence[MaskRule], code: int) -> MaskRecord:
    """Return the mask rules of one tensor, all of one kind, as a kernel reads them.

    `code` is the dtype of the merged task vector that the masks are made for.
    """
    dtype = next(name for name, number in CODES.items() if number == code)
    significant = [rule for rule in rules if isinstance(rule, Significant)]
    if significant and all(is_short(rule.mask_scale, dtype) for rule in significant):
        halves = tuple(np.float64(rule.mask_scale * 0.5) for rule in significant)
        return MaskRecord(SIGNIFICANT_SHORT, halves)
    scales = tuple(np.float64(rule.factor(dtype)) for rule in rules)
    return MaskRecord(rules[0].kind, scales)


def make_pass(request: PassRequest) -> CompiledPass | None:
    """Return the pass of a method that locates and combines; None where a rule has no kernel."""
    method = request.method
    assert isinstance(method, LocateAndCombine)
    rules = method.locating.rules(request.tensor, request.parameters, request.experts)
    if any(rule.kind is None for rule in rules):
        return None
    if isinstance(method, LocateThenMask):
        return LocatedMaskPass(request, method, rules)
    if any(isinstance(rule, DropByRank) for rule in rules):
        return RowPass(request, method, rules)
    return LocatedPass(request, method, rules)


def make_consensus_pass(request: PassRequest) -> CompiledPass | None:
    """Return the pass of consensus merging."""
    method = request.method
    assert isinstance(method, Consensus)
    rules = method.locating.rules(request.tensor, request.parameters, request.experts)
    return ConsensusPass(request, method, rules)
