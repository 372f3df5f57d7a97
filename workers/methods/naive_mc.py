"""NaiveMC: encoders and connectors are copied, the language models are averaged."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


class NaiveMc(Method):
    """θ = θ₀ + mean τᵢ."""

    name = "naive_mc"
    kind = "plain"
    compiled_pass = "mmerge.workers.compiled.linear:MeanPass"
    source = "Model Composition for Multimodal LLMs, arXiv 2402.12750 (ACL 2024)"

    @override
    def merge_block(
        self, block: Block, parameters: Parameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        deltas = block.task_vectors()
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total += delta
        return MergedBlock((block.base + total / len(deltas)).to(block.dtype))
