"""Configuration, tokenizer and processor files of a model, checked before transformers reads them.

They are data of whoever made the checkpoint. transformers follows what they say: code of a
repository, kernels of the Hub, sizes of any magnitude, regular expressions of any cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.pattern_checks import find_costly_part
from mmerge.workers.families.model_config import (
    CODE_KEY,
    to_loadable_config,
    walk_json,
    without_code,
)
from mmerge.workers.families.registry import parse_config

_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_SIZE_KEYS = ("size", "crop_size", "image_size", "pad_size")
_EDGE_KEYS = ("height", "width", "shortest_edge", "max_height", "max_width")


def read_config(data: bytes, *, owner: str) -> dict[str, Any]:
    """Return a config.json without the keys that name code.

    Raises:
        CheckpointError: it is no JSON object, asks for kernels from the Hub, or describes a model
            of too many layers.
    """
    where = f"{owner}: config.json"
    try:
        raw = parse_config(data, where=where)
    except ValueError as error:
        raise CheckpointError(f"{error}. Fetch the checkpoint again") from error
    return to_loadable_config(raw, where=where)


def to_loadable_files(files: Mapping[str, bytes], *, owner: str) -> dict[str, bytes]:
    """Return the files that tokenizer and processor are loaded from, without what names code.

    Raises:
        CheckpointError: a JSON file is malformed, a processor makes inputs beyond the limits, or a
            tokenizer has a regular expression whose time is not bounded.
    """
    loadable = {}
    for name, data in files.items():
        if not name.endswith(".json"):
            loadable[name] = data
            continue
        where = f"{owner}: {name}"
        try:
            value = parse_json(data, what=where, allow_infinity=True)
        except ValueError as error:
            raise CheckpointError(f"{error}. Fetch the checkpoint again") from error
        if name in _PROCESSOR_FILES:
            _check_processor(value, where=where)
        if name == "tokenizer.json":
            _check_patterns(value, where=where)
        has_code = any(key == CODE_KEY for key, _ in walk_json(value))
        loadable[name] = json.dumps(without_code(value)).encode() if has_code else data
    return loadable


def _check_processor(value: Any, *, where: str) -> None:
    """Raise CheckpointError for sizes whose images, or samples, do not fit into memory."""
    for key, item in walk_json(value):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            limits.PROCESSOR_NUMBER.check(item, where=f"{where}: {key}", error=CheckpointError)
        if key in _SIZE_KEYS:
            _check_size(item, where=f"{where}: {key}")


def _check_size(item: Any, *, where: str) -> None:
    edges: list[Any] = []
    if isinstance(item, dict):
        # With a longest edge beside it, the shortest may be a number of pixels (Qwen-VL).
        keys = ("height", "width") if "longest_edge" in item else _EDGE_KEYS
        edges = [item[key] for key in keys if key in item]
    elif isinstance(item, list):
        edges = item
    else:
        edges = [item]
    for edge in edges:
        if isinstance(edge, (int, float)):
            limits.PROCESSOR_EDGE.check(edge, where=where, error=CheckpointError)


def _check_patterns(value: Any, *, where: str) -> None:
    for key, pattern in walk_json(value):
        if key != "Regex" or not isinstance(pattern, str):
            continue
        limits.PATTERN_CHARACTERS.check(
            len(pattern), where=f"{where}: a regular expression", error=CheckpointError
        )
        costly = find_costly_part(pattern)
        if costly:
            raise CheckpointError(
                f"{where}: the regular expression {pattern!r} repeats {costly!r}, which itself"
                " repeats or branches: a short text could take years. Rewrite it without nesting"
            )


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write small files to a folder. Raises CheckpointError for a name that is a path."""
    for name, data in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{name!r}: expected a file name without folders")
        (folder / name).write_bytes(data)
