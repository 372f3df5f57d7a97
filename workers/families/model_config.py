"""A config.json as transformers may be given it: without code, with a bounded number of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.errors import CheckpointError

CODE_KEY = "auto_map"
"""Names Python files that replace the classes of transformers; they are never run."""
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "depths")


def to_loadable_config(raw: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a configuration without the keys that name code.

    Everything that gives a configuration to transformers passes it through here: making a model,
    on the meta device too, downloads and runs the attention kernel that its configuration names.

    Raises:
        CheckpointError: it asks for kernels from the Hub, or describes a model of too many layers;
            the message begins with `where`.
    """
    for key, value in walk_json(raw):
        if key in _KERNEL_KEYS:
            _check_kernel(key, value, where=where)
        elif key in _LAYER_KEYS or key.endswith("_layers"):
            _check_layers(key, value, where=where)
    plain: dict[str, Any] = without_code(raw)
    return plain


def to_architecture(architectures: Any, *, where: str) -> str:
    """Return the first of the `architectures` of a configuration, empty for none.

    Raises:
        CheckpointError: they are no list of names; the message begins with `where`.
    """
    names = architectures or [""]
    if not isinstance(names, (list, tuple)) or not isinstance(names[0], str):
        raise CheckpointError(
            f"{where}, 'architectures': expected a list with the name of a model class, got"
            f" {architectures!r}"
        )
    return names[0]


def find_model_class(name: str, *, where: str) -> Any:
    """Return the model class of transformers of a name.

    Raises:
        CheckpointError: there is none, or it is no class of models; the message begins with
            `where`.
    """
    import transformers

    model_class: Any = getattr(transformers, name, None)
    is_model = isinstance(model_class, type) and issubclass(
        model_class, transformers.PreTrainedModel
    )
    if is_model and model_class.config_class is not None:  # the base class of all models has none
        return model_class
    raise CheckpointError(
        f"{where}, 'architectures': transformers {transformers.__version__} has no model class"
        f" {name!r}"
    )


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


def walk_json(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested JSON objects, with its value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack += [part for part in item.values() if isinstance(part, (dict, list))]
        elif isinstance(item, list):
            stack += [part for part in item if isinstance(part, (dict, list))]


def without_code(value: Any) -> Any:
    """Return a JSON value without the keys that name Python files, at any depth."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if key != CODE_KEY}
    if isinstance(value, list):
        return [without_code(item) for item in value]
    return value
