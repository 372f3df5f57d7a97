"""Write a merge as a LoRA adapter of the base: every matrix's task vector, truncated by SVD."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmerge.manifests.errors import CheckpointError, ManifestError, ShapeMismatch, StoreError
from mmerge.manifests.format.entry import Role
from mmerge.workers.adapters.files import CONFIG_FILE, WEIGHT_FILES
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.dtypes import to_tensor
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores
from mmerge.workers.exports.folder import to_export_folder
from mmerge.workers.methods.matrix import is_layer_matrix
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight
from mmerge.workers.runtime.cores import one_thread


@dataclass
class AdapterReport:
    """What was written, and how much of the merge an adapter of that rank leaves out."""

    folder: str
    rank: int
    num_matrices: int = 0
    residual: float = 0.0
    """‖τ − BA‖ / ‖τ‖ over all matrices."""
    left_out: list[str] = field(default_factory=list)
    """Changed tensors that are no matrix of a layer, and so keep the values of the base."""


def export_adapter(
    uri: str,
    folder: str | Path,
    *,
    rank: int,
    base: str | None = None,
    expert: str | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> AdapterReport:
    """Write a PEFT adapter of a merged language model and return how close it is to the merge.

    Of each matrix of a layer the task vector τ = θ − θ₀ is truncated to its `rank` leading singular
    triplets (the best approximation of that rank, Eckart and Young 1936): B = U√S [out, rank], A =
    √S·Vᵀ [rank, in], float32, scale 1. Where τ has fewer ranks, the rest is zero.

    Args:
        uri: the composite; its language model for text tokens is taken.
        folder: must be empty or not exist.
        rank: of every pair of factors; at most the largest rank of a matrix.
        base: the base's checkpoint. Plain builds need it, since they do not contain their base.
        expert: an expert to rebuild instead.
        on_bytes: called with the bytes of every matrix.

    Raises:
        ManifestError: the base is needed, or is not this build's, or the rank is out of range.
        StoreError: the folder is not empty or cannot be written.
    """
    if rank < 1:
        raise ManifestError(f"rank: expected a whole number from 1 on, got {rank}")
    reader = BuildReader(uri)
    if expert:
        reader.manifest.to_expert(expert)
    target = to_export_folder(folder)
    ranks = [min(reader.shape(name, role)) for name, role in _layer_matrices(reader)]
    max_rank = max(ranks, default=rank)
    if rank > max_rank:
        raise ManifestError(
            f"rank: no matrix of a layer of {uri} has more than {max_rank}, got {rank}"
        )
    report = AdapterReport(str(target), rank)
    with one_thread():
        factors = _make_factors(reader, _BaseReader(reader, base), expert, report, on_bytes)
    # Written under a temporary name, so that an interrupted export is no adapter.
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Imports torch, which a report of an earlier export does not need.
        from safetensors.torch import save_file

        save_file(factors, partial / WEIGHT_FILES[0], metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(
            json.dumps(_make_config(factors, rank, base), indent=2, sort_keys=True) + "\n"
        )
        # safetensors creates files that only their owner can read.
        shutil.copymode(partial / CONFIG_FILE, partial / WEIGHT_FILES[0])
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise StoreError(
            f"{target}: cannot be written ({error.strerror or error}). Choose another folder with"
            " --to"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


class _BaseReader:
    """θ₀ by name: from the build where it holds the base, else from the base's checkpoint."""

    def __init__(self, reader: BuildReader, base: str | None) -> None:
        self._reader, self._stores = reader, OpenStores()
        self._checkpoint = Checkpoint(base, owner="base") if base is not None else None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the base, float32. Raises ManifestError where there is none."""
        if self._reader.has(name, "base"):
            return self._reader.read(name, "base").to(torch.float32)
        if self._checkpoint is None:
            raise ManifestError(
                f"{self._reader.uri}: a plain build does not contain its base, which an adapter"
                " refers to. Name it with --base"
            )
        source = self._checkpoint.tensors.get(name)
        if source is None:
            raise CheckpointError(
                f"base: {self._checkpoint.uri} has no {name}; the build does. Name the base that it"
                " was made from"
            )
        data = read_source(source, stores=self._stores, offset=0, num_bytes=source.spec.num_bytes)
        return to_tensor(data, source.spec.dtype).to(torch.float32).reshape(source.spec.shape)


def _layer_matrices(reader: BuildReader) -> Iterator[tuple[str, Role]]:
    for name in reader.llm_names():
        role: Role = "merged" if reader.has(name, "merged") else "base"
        if is_layer_matrix(name, reader.shape(name, role)):
            yield name, role


def _make_factors(
    reader: BuildReader,
    base: _BaseReader,
    expert: str | None,
    report: AdapterReport,
    on_bytes: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    factors: dict[str, torch.Tensor] = {}
    whole = missed = 0.0
    for name in reader.llm_names():
        merged = (
            rebuild_weight(reader, name, expert=expert) if expert else text_weight(reader, name)
        )
        original = base.read(name)
        if expert and merged.shape != original.shape:
            report.left_out.append(name)  # an expert's own vocabulary rows
            continue
        if merged.shape != original.shape:
            raise ShapeMismatch(
                f"{name}: the build has {tuple(merged.shape)}, the base {tuple(original.shape)}."
                " Name the base that it was made from"
            )
        delta = merged.to(torch.float32) - original
        on_bytes(merged.numel() * merged.element_size())
        if not delta.any():
            continue
        if not is_layer_matrix(name, delta.shape):
            report.left_out.append(name)
            continue
        try:
            a, b = truncate_to_factors(delta, rank=report.rank)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ManifestError(
                f"{name}: the decomposition of what the merge changed does not converge ({error})."
                " Export the whole checkpoint instead"
            ) from error
        path = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        whole += float(delta.to(torch.float64).square().sum())
        missed += float((delta - b @ a).to(torch.float64).square().sum())
        report.num_matrices += 1
    if not factors:
        raise ManifestError(
            f"{reader.uri}: the merge changed no matrix of a layer, so there is no adapter to write"
        )
    report.residual = math.sqrt(missed / whole)
    return factors


def truncate_to_factors(delta: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank], float32; B·A is the best approximation by rank."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    a, b = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    a[:count], b[:, :count] = root.unsqueeze(-1) * vt[:count], u[:, :count] * root
    return a, b


def _make_config(
    factors: dict[str, torch.Tensor], rank: int, base: str | None
) -> dict[str, object]:
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name in factors})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "modules_to_save": None,
    }
