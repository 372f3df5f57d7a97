"""The files that hold the weights of a checkpoint, and the tensors in their headers.

Read are safetensors and the files of `torch.save`, one file or shards, with or without an index. Of
a folder that holds both kinds, safetensors are taken, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmerge.manifests.errors import CheckpointError, NotFound, StoreError
from mmerge.manifests.format.safetensors_header import (
    TensorSpec,
    header_length,
    parse_header,
    parse_metadata,
)
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.sources import TensorSource

_FIRST_READ_BYTES = 1 << 16
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that files of 2023 hold. The class computes them from the configuration."""


@dataclass(frozen=True)
class _Layout:
    """The names that one format gives to its files."""

    single: str
    index: str
    shard: str
    """Regular expression of the name of a shard: its number and the number of shards."""


_LAYOUTS = (
    _Layout(
        "model.safetensors",
        "model.safetensors.index.json",
        r"model-(\d{5})-of-(\d{5})\.safetensors",
    ),
    _Layout(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        r"pytorch_model-(\d{5})-of-(\d{5})\.bin",
    ),
)
"""In the order in which they are looked for."""

WeightFiles = dict[str, list[str] | None]
"""The tensors that are read of each file; None for all."""


def has_weight_files(store: ReadableStore) -> bool:
    """Return whether a folder holds the weights of a whole model."""
    names = _list_files(store)
    return any(
        {layout.single, layout.index} & set(names) or _find_shards(layout, names)
        for layout in _LAYOUTS
    )


def find_weight_files(
    store: ReadableStore, *, read_json: Callable[[str], Mapping[str, Any]], where: str
) -> WeightFiles:
    """Return the weight files of a checkpoint.

    Args:
        store: the folder.
        read_json: reads a JSON object of the folder.
        where: names the folder in errors.

    Raises:
        CheckpointError: there are none, a shard is missing, or it is unclear which files count.
    """
    names = _list_files(store)
    for layout in _LAYOUTS:
        if layout.index in names:
            files = _read_index(read_json(layout.index), layout.index, where=where)
            if layout.single in names and layout.single not in files:
                raise CheckpointError(
                    f"{where}: has both {layout.single} and {layout.index}, which names other"
                    " files, so that it is unclear which weights are meant. Delete one of the two"
                )
            return files
        if layout.single in names:
            return {layout.single: None}
        shards = _find_shards(layout, names)
        if shards:
            return _check_shards(shards, where=where)
    refuse_gguf(store, where=where)
    raise CheckpointError(
        f"{where} has none of {_LAYOUTS[0].single}, {_LAYOUTS[0].index}, {_LAYOUTS[1].single} and"
        f" {_LAYOUTS[1].index}. Save the model with save_pretrained"
    )


def refuse_gguf(store: ReadableStore, *, where: str) -> None:
    """Raise CheckpointError if a folder holds GGUF files."""
    gguf = next((name for name in _list_files(store) if name.endswith(".gguf")), None)
    if gguf is not None:
        raise CheckpointError(
            f"{where} holds its weights as GGUF ({gguf}), which is not read. Give the checkpoint"
            " from which it was converted, or convert it back (transformers: from_pretrained with"
            " gguf_file, save_pretrained)"
        )


def read_tensors(
    store: ReadableStore, files: WeightFiles, *, uri: str, owner: str
) -> dict[str, TensorSource]:
    """Return every tensor of a checkpoint by its stored name; reads headers only.

    Args:
        store: the folder.
        files: from `find_weight_files`.
        uri: that of the folder.
        owner: whose checkpoint it is ("base", "expert 'image'"), for errors.

    Raises:
        CheckpointError: a file is missing or damaged, lacks a tensor of the index, or holds one
            that no index names or that another file holds, too.
    """
    where = f"{owner}: {uri}"
    sources: dict[str, TensorSource] = {}
    indexed = {name for names in files.values() for name in names or ()}
    for file, names in files.items():
        specs = read_specs(store, file, where=f"{where}/{file}")
        missing = sorted(set(names or ()) - set(specs))
        if missing:
            raise CheckpointError(
                f"{where}/{file} lacks {missing[0]}, which the index places there. Fetch the"
                " checkpoint again"
            )
        if names is not None:
            unlisted = sorted(set(specs) - indexed)
            if unlisted:
                raise CheckpointError(
                    f"{where}/{file} holds {unlisted[0]}, which the index does not name. Fetch the"
                    " checkpoint again"
                )
        for name in specs if names is None else names:
            if name in sources:
                raise CheckpointError(
                    f"{where}: {name} is in {sources[name].file} and in {file}, and no index says"
                    " which of the two counts. Fetch the checkpoint with its index"
                )
            sources[name] = TensorSource(uri, file, specs[name])
    return sources


def read_specs(store: ReadableStore, file: str, *, where: str) -> dict[str, TensorSpec]:
    """Return the tensors in one weight file by name, without buffers that are computed.

    A name that `safetensors.torch.save_model` dropped since its tensor is another one's counts as a
    tensor of the same bytes.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors.
    """
    try:
        if file.endswith(".safetensors"):
            specs = _read_safetensors(store, file, where=where)
        else:
            # Imported here: it needs torch, which safetensors do without.
            from mmerge.workers.checkpoints.torch_pickle import read_pickled_specs

            specs = read_pickled_specs(store, file, where=where)
    except NotFound as error:
        raise CheckpointError(
            f"{where}: no such file, though the index names it. Fetch the checkpoint again"
        ) from error
    except StoreError as error:
        raise CheckpointError(f"{where}: {Exception.__str__(error)}") from error
    return {name: spec for name, spec in specs.items() if not _BUFFERS.search(name)}


def _read_safetensors(store: ReadableStore, file: str, *, where: str) -> dict[str, TensorSpec]:
    file_bytes = store.num_bytes(file)
    prefix = store.read_range(file, offset=0, num_bytes=min(_FIRST_READ_BYTES, file_bytes))
    needed = 8 + header_length(prefix[:8], file_bytes=file_bytes, where=where)
    if needed > len(prefix):
        prefix = store.read_range(file, offset=0, num_bytes=needed)
    specs = parse_header(prefix, file_bytes=file_bytes, where=where)
    shared = {
        dropped: replace(specs[kept], name=dropped)
        for dropped, kept in parse_metadata(prefix).items()
        if kept in specs and dropped not in specs
    }
    return specs | shared


def _list_files(store: ReadableStore) -> list[str]:
    return sorted(key for key in store.list() if "/" not in key)


def _find_shards(layout: _Layout, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return number and count of every file that has the name of a shard."""
    shards = {}
    for name in names:
        match = re.fullmatch(layout.shard, name)
        if match:
            shards[name] = (int(match[1]), int(match[2]))
    return shards


def _check_shards(shards: Mapping[str, tuple[int, int]], *, where: str) -> WeightFiles:
    """Return the files of a complete set of shards without an index."""
    counts = {count for _, count in shards.values()}
    numbers = {number for number, _ in shards.values()}
    if len(counts) > 1 or numbers != set(range(1, next(iter(counts)) + 1)):
        raise CheckpointError(
            f"{where}: holds {', '.join(shards)} and no index: these are not all shards of one"
            " model. Fetch the checkpoint again"
        )
    return dict.fromkeys(shards)


def _read_index(index: Mapping[str, Any], name: str, *, where: str) -> WeightFiles:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(f"{where}/{name} has no weight_map. Fetch the checkpoint again")
    files: WeightFiles = {}
    for tensor, file in sorted(weight_map.items()):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{where}/{name} places {tensor} in {file!r}; only files in the same folder are"
                " read"
            )
        names = files.setdefault(file, [])
        assert names is not None
        if not _BUFFERS.search(tensor):
            names.append(tensor)
    return files
