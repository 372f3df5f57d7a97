"""Configuration, tokenizer and processor files of a model, checked before transformers reads them.

They are data of whoever made the checkpoint. transformers follows what they say: code of a
repository, kernels of the Hub, sizes of any magnitude, regular expressions of any cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.pattern_checks import find_costly_part
from mmerge.workers.families.registry import parse_config

_CODE_KEY = "auto_map"
"""Names Python files that replace the classes of transformers; they are never run."""
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "depths")
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
    for key, value in _walk(raw):
        if key in _KERNEL_KEYS:
            _check_kernel(key, value, where=where)
        elif key in _LAYER_KEYS or key.endswith("_layers"):
            _check_layers(key, value, where=where)
    plain: dict[str, Any] = _without_code(raw)
    return plain


def _check_kernel(key: str, value: Any, *, where: str) -> None:
    """Raise CheckpointError for an attention that transformers would download as code."""
    names = list(value.values()) if isinstance(value, dict) else [value]
    for name in names:
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise CheckpointError(
                f"{where}: {key} {name!r} names code outside transformers, which is not run. Remove"
                " the key"
            )


def _check_layers(key: str, value: Any, *, where: str) -> None:
    counts = value if isinstance(value, list) else [value]
    for count in counts:
        if isinstance(count, int):
            limits.ENCODER_LAYERS.check(count, where=f"{where}: {key}", error=CheckpointError)


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
        has_code = any(key == _CODE_KEY for key, _ in _walk(value))
        loadable[name] = json.dumps(_without_code(value)).encode() if has_code else data
    return loadable


def _check_processor(value: Any, *, where: str) -> None:
    """Raise CheckpointError for sizes whose images, or samples, do not fit into memory."""
    for key, item in _walk(value):
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
    for key, pattern in _walk(value):
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


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested JSON objects, with its value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack += [part for part in item.values() if isinstance(part, (dict, list))]
        elif isinstance(item, list):
            stack += [part for part in item if isinstance(part, (dict, list))]


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key != _CODE_KEY}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write small files to a folder. Raises CheckpointError for a name that is a path."""
    for name, data in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{name!r}: expected a file name without folders")
        (folder / name).write_bytes(data)
