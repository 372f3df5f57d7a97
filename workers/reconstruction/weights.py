"""Weights of experts and of text tokens, reconstructed from a build of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmerge.workers.checkpoints.lora_weights import LowRank, add_adapters
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_read import read_masked_weight
from mmerge.workers.reconstruction.masked_weights import add_masked_tensor


def rebuild_weight(
    reader: BuildReader, name: str, *, expert: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a language-model tensor of one expert (MMER, Retention).

    Of a build of masks θ₀ + mᵢ∘τ⋆, of adapters the weights of the expert's text tokens, of a plain
    build the merged tensor; the expert's own tensor where the recipe lists it under `carry`. The
    vocabulary rows that the expert added follow the others.

    Args:
        reader: the build.
        name: of the tensor, in the base.
        expert: its name.
        dtype: of the result, the build's if absent; computed in float32 and rounded once. Tensors
            of integers keep theirs.
    """
    dtype = dtype or reader.dtype
    expert_name = reader.expert_name(name, expert=expert)
    if reader.has(expert_name, "carried", expert):
        return _round(reader.read(expert_name, "carried", expert), dtype)
    weight = _reconstruct(reader, name, experts=[expert], is_alone=True, dtype=dtype)
    if not reader.has(name, "extra_rows", expert):
        return weight
    return torch.cat([weight, reader.read(name, "extra_rows", expert).to(weight.dtype)])


def text_weight(
    reader: BuildReader, name: str, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a language-model tensor for text tokens; `dtype` as of `rebuild_weight`.

    Of a build of masks θ₀ + m̄∘τ⋆, of adapters θ₀ + Σ cᵢ·s·B_dᵢ A_dᵢ, of a plain build the merged
    tensor.
    """
    dtype = dtype or reader.dtype
    return _reconstruct(reader, name, experts=reader.expert_names, is_alone=False, dtype=dtype)


def read_adapter(reader: BuildReader, name: str, *, expert: str, adapter: str) -> LowRank | None:
    """Return an expert's adapter of the Linear whose weight has this name, None if it has none."""
    path = name.removesuffix(".weight")
    if not reader.has(f"{path}.lora_A.{adapter}.weight", "adapter", expert):
        return None
    record = reader.manifest.to_expert(expert).adapters
    assert record is not None
    a, b = (
        reader.read(f"{path}.lora_{factor}.{adapter}.weight", "adapter", expert) for factor in "AB"
    )
    return LowRank(a, b, record.scale_of(reader.stored_name(name), adapter))


def read_default_adapters(
    reader: BuildReader, name: str, *, experts: Sequence[str], is_alone: bool
) -> list[LowRank]:
    """Return the default adapters of some experts in a Linear.

    Their scales are multiplied by the coefficients of the merge unless one expert is rebuilt alone.
    """
    adapters = []
    for expert in experts:
        record = reader.manifest.to_expert(expert).adapters
        if record is None:
            continue
        default = read_adapter(reader, name, expert=expert, adapter=record.default_adapter)
        if default is None:
            continue
        coefficient = 1.0 if is_alone else record.coefficient
        adapters.append(LowRank(default.a, default.b, default.scale * coefficient))
    return adapters


def _reconstruct(
    reader: BuildReader, name: str, *, experts: Sequence[str], is_alone: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Return a tensor of one expert alone, or of the text tokens of all of them."""
    if reader.has(name, "merged"):
        return _round(reader.read(name, "merged"), dtype)
    if reader.has(name, "delta"):
        return _reconstruct_masked(reader, name, experts, dtype=dtype)
    base = reader.read(name, "base")
    if reader.manifest.kind == "adapters":
        adapters = read_default_adapters(reader, name, experts=experts, is_alone=is_alone)
        if adapters:
            return add_adapters(base, adapters, dtype=dtype)
    return _round(base, dtype)


def _round(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def _reconstruct_masked(
    reader: BuildReader, name: str, experts: Sequence[str], *, dtype: torch.dtype
) -> torch.Tensor:
    factors = [reader.rescaler(expert) for expert in experts]
    pieces = reader.masked_pieces(name, experts)
    weight = read_masked_weight(reader, pieces, dtype=dtype, factors=factors)
    if weight is not None:
        return weight.values
    return add_masked_tensor(
        reader.read(name, "base"),
        reader.read(name, "delta"),
        [reader.read_packed_mask(name, expert) for expert in experts],
        factors=factors,
        dtype=dtype,
    )
