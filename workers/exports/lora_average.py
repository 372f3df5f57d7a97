"""Average LoRA adapters factor by factor, for comparison with published results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmerge.manifests.errors import RecipeError, ShapeMismatch, StoreError
from mmerge.workers.adapters.files import CONFIG_FILE, WEIGHT_FILES
from mmerge.workers.adapters.folder import AdapterFolder
from mmerge.workers.checkpoints.dtypes import to_tensor
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource
from mmerge.workers.methods.lora_factors import STRATEGIES, average_lora
from mmerge.workers.runtime.cores import one_thread


def write_average(uris: Sequence[str], folder: Path, *, strategy: str, density: float) -> int:
    """Write the adapter whose factors are the averages of those at `uris`; return their number.

    Of a folder with several adapters the one called `default` counts.

    Raises:
        RecipeError: the strategy is unknown, or fewer than two adapters are given.
        ShapeMismatch: the adapters differ in rank or scale.
        StoreError: the folder is not empty or cannot be written.
    """
    if strategy not in STRATEGIES:
        raise RecipeError(f"--strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if len(uris) < 2:
        raise RecipeError("average-lora: give at least two adapters")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"{folder}: is not empty. Choose a new folder for the adapter, or delete this one"
        )
    folders = [AdapterFolder(uri, owner=f"adapter {uri}") for uri in uris]
    experts, scales, ranks = [], set(), set()
    for adapter_folder in folders:
        pairs = adapter_folder.plain_pairs_of(adapter_folder.default_adapter, use="average-lora")
        scales |= {adapter_folder.scale_of(pair) for pair in pairs}
        ranks |= {pair.rank for pair in pairs}
        factors = {}
        for pair in pairs:
            factors[f"{pair.module}.lora_A.weight"] = _read(pair.a)
            factors[f"{pair.module}.lora_B.weight"] = _read(pair.b)
        experts.append(factors)
    with one_thread():
        merged = average_lora(experts, strategy=strategy, density=density)
    if len(scales) != 1 or len(ranks) != 1:
        raise ShapeMismatch(
            f"the adapters have the scales {sorted(scales)} and ranks {sorted(ranks)}; factors can"
            " be averaged only where both are equal. Give the adapters as experts of a recipe:"
            " their products are merged then"
        )
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scales.pop() * rank,
        "target_modules": _modules(merged),
        "bias": "none",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"base_model.model.{name}": value.contiguous() for name, value in merged.items()},
            folder / WEIGHT_FILES[0],
        )
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written ({error.strerror or error}). Choose another folder with"
            " --to"
        ) from error
    return len(merged)


def _modules(factors: dict[str, torch.Tensor]) -> list[str]:
    return sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in factors})


def _read(source: TensorSource) -> torch.Tensor:
    data = read_source(source, stores=OpenStores(), offset=0, num_bytes=source.spec.num_bytes)
    return to_tensor(data, source.spec.dtype).to(torch.float32).reshape(source.spec.shape)
