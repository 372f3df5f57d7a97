"""Write a Hugging Face checkpoint of one rebuilt expert, or of a merged language model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmerge.manifests.errors import ManifestError, StoreError
from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.workers.adapters.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mmerge.workers.exports.folder import to_export_folder
from mmerge.workers.exports.relaid import ExpertLayout
from mmerge.workers.families.registry import parse_config, text_config_of
from mmerge.workers.modalities.small_files import write_files
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.expert_only import refuse_unshared
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

MAX_FILE_BYTES = 5 * 10**9
"""Weights are split into files of at most this size, as transformers does."""
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: str
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]


def export(
    uri: str,
    folder: str | Path,
    *,
    expert: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> ExportReport:
    """Write a checkpoint that `transformers` loads with `from_pretrained`, and return what was
    written.

    Args:
        uri: the composite.
        folder: must be empty or not exist.
        expert: the expert to rebuild, with its encoder, processor and tokenizer. Without one: the
            language model for text tokens alone (the merged model of a plain build, θ₀ + m̄∘τ⋆ of
            one with masks), with the base's tokenizer.
        max_file_bytes: weights are split into files of at most this size.
        on_bytes: called with the bytes of every tensor that is written.

    Raises:
        ManifestError: the build is missing or damaged, or has no such expert.
        StoreError: the folder is not empty or cannot be written.
    """
    reader = BuildReader(uri)
    record = reader.manifest.to_expert(expert) if expert else reader.manifest.base
    if expert and reader.manifest.kind == "adapters":
        raise ManifestError(
            f"{uri}: an expert with decoupled adapters is no ordinary checkpoint: its tokens are"
            " multiplied by different weights. Export without --expert for the weights of text"
            " tokens"
        )
    if expert is None:
        refuse_unshared(reader, None)
    target = to_export_folder(folder)
    # Written under a temporary name, so that an interrupted export is no checkpoint.
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_small_files(reader, record.files, partial, expert=expert)
        report = _write_weights(reader, expert, partial, max_file_bytes, on_bytes)
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
    return ExportReport(
        str(target), report[0], report[1], tuple(sorted(path.name for path in target.iterdir()))
    )


def _write_small_files(
    reader: BuildReader, entries: tuple[FileEntry, ...], folder: Path, *, expert: str | None
) -> None:
    # Beside an adapter's configuration, transformers would take the whole checkpoint for an adapter
    # of another base.
    files = {
        entry.name: read_file(reader.store, entry)
        for entry in entries
        if entry.name != ADAPTER_CONFIG_FILE
    }
    if "config.json" not in files:
        raise ManifestError(f"{reader.uri}: the build has no config.json to export")
    try:
        config = parse_config(files["config.json"], where=f"{reader.uri}: config.json")
    except ValueError as error:
        raise ManifestError(f"{error}, so that nothing can be exported") from error
    dtype = _CONFIG_DTYPES.get(reader.manifest.dtype)
    stated_rows = text_config_of(config).get("vocab_size")
    # An adapter may have added tokens to the base whose configuration it shares. All other
    # configurations describe their own files; Mllama's embedding has more rows than vocab_size.
    is_adapter = any(entry.name == ADAPTER_CONFIG_FILE for entry in entries)
    num_rows = _count_vocabulary(reader, expert) if is_adapter else None
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if dtype and key in part:
                part[key] = dtype
        if num_rows is not None and stated_rows and part.get("vocab_size") == stated_rows:
            part["vocab_size"] = num_rows
    files["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    write_files(files, folder)


def _count_vocabulary(reader: BuildReader, expert: str | None) -> int | None:
    """Return the rows of the exported embedding."""
    name = reader.family.find_embedding(reader.llm_names())
    if name is None:
        return None
    role: Role = "merged" if reader.has(name, "merged") else "base"
    if expert is None:
        return reader.num_rows(name, role)
    expert_tensor = reader.manifest.rename(name, expert=expert)
    if reader.has(expert_tensor, "carried", expert):
        return reader.num_rows(expert_tensor, "carried", expert)
    if reader.has(name, "extra_rows", expert):
        return reader.num_rows(name, "extra_rows", expert)
    return reader.num_rows(name, role)


def _iterate_tensors(reader: BuildReader, expert: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the export under its name in the expert's (or the base's) files."""
    if expert is None:
        for name in reader.llm_names():
            yield name, text_weight(reader, name)
        return
    renamed = {reader.manifest.rename(name, expert=expert) for name in reader.llm_names()}
    names = reader.llm_names()
    if reader.manifest.to_expert(expert).layout == "base":
        layout = _read_layout(reader, expert)
        names = [name for name in names if name not in layout.names]
        yield from layout.iterate(lambda name: rebuild_weight(reader, name, expert=expert))
    for name in names:
        yield (
            reader.manifest.rename(name, expert=expert),
            rebuild_weight(reader, name, expert=expert),
        )
    for name in reader.names("carried", expert):
        if name not in renamed:
            yield name, reader.read(name, "carried", expert)


def _read_layout(reader: BuildReader, expert: str) -> ExpertLayout:
    """Return which tensors of a build an expert's class saves otherwise. Raises ManifestError."""
    configs = []
    for record in (reader.manifest.base, reader.manifest.to_expert(expert)):
        entry = next(file for file in record.files if file.name == "config.json")
        data = read_file(reader.store, entry)
        configs.append(parse_config(data, where=f"{reader.uri}: config.json"))
    roles: tuple[Role, Role] = ("merged", "base")
    shapes = {}
    for name in reader.llm_names():
        role = next(role for role in roles if reader.has(name, role))
        shapes[name] = reader.shape(name, role)
    return ExpertLayout(configs[0], configs[1], shapes)


def _write_weights(
    reader: BuildReader,
    expert: str | None,
    folder: Path,
    max_file_bytes: int,
    on_bytes: Callable[[int], None],
) -> tuple[int, int]:
    files: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    waiting_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal waiting, waiting_bytes
        path = folder / f"part{len(files)}"
        save_file(waiting, path, metadata={"format": "pt"})
        # safetensors creates files that only their owner can read.
        shutil.copymode(folder / "config.json", path)
        files.append(list(waiting))
        waiting, waiting_bytes = {}, 0

    for name, tensor in _iterate_tensors(reader, expert):
        num_bytes = tensor.numel() * tensor.element_size()
        if waiting and waiting_bytes + num_bytes > max_file_bytes:
            flush()
        waiting[name] = tensor.contiguous()
        waiting_bytes += num_bytes
        total_bytes += num_bytes
        on_bytes(num_bytes)
    flush()
    _name_files(folder, files, total_bytes)
    return sum(map(len, files)), total_bytes


def _name_files(folder: Path, files: list[list[str]], total_bytes: int) -> None:
    if len(files) == 1:
        (folder / "part0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index_json = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")
