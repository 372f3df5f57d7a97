"""Configurations and models of transformers, made of what a checkpoint's files say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.families.model_config import find_model_class, to_architecture
from mmerge.workers.modalities.image_files import describe_error
from mmerge.workers.modalities.small_files import read_config

SPARE_WEIGHTS = 1 << 26
"""Weights and buffers that a model may have beyond twice what its files hold."""


def make_config(files: Mapping[str, bytes], *, owner: str) -> Any:
    """Return the transformers configuration of a model from its files.

    Raises:
        CheckpointError: transformers does not know the model type, or the configuration describes a
            model beyond the limits; `owner` is named.
    """
    raw = read_config(files["config.json"], owner=owner)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} does not know model type"
            f" {model_type!r}; models with code of their own are not run"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} cannot read its config.json"
            f" ({describe_error(error)}). Compare it with the checkpoint's original"
        ) from error


def make_model(
    config: Any,
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    owner: str,
    may_lack: Callable[[str], bool],
) -> Any:
    """Return the transformers model of a configuration with these weights, named as in its files.

    Raises:
        CheckpointError: the class is unknown, there are unexpected weights, or weights are missing
            for which `may_lack` is false.
    """
    where = f"{owner}: config.json"
    name = to_architecture(config.architectures, where=where)
    model_class = find_model_class(name, where=where)
    _check_size(model_class, config, state, owner=owner)
    verbosity = transformers.logging.get_verbosity()
    has_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} cannot make a {name} of its"
            f" config.json and tensors ({type(error).__name__}: {describe_error(error)}). Compare"
            " them with the checkpoint's original"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()
    misfits = [
        *sorted(key for key in info["missing_keys"] if not may_lack(key)),
        *sorted(info["unexpected_keys"]),
        *sorted(map(str, info["mismatched_keys"])),
    ]
    if misfits:
        raise CheckpointError(
            f"{owner}: its tensors do not fit {name} of transformers {transformers.__version__}:"
            f" {misfits[0]} and {len(misfits) - 1} more"
        )
    return model.eval()


def _check_size(
    model_class: Any, config: Any, state: Mapping[str, torch.Tensor], *, owner: str
) -> None:
    """Raise CheckpointError for a configuration of a much larger model than the tensors fill."""
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except Exception as error:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} cannot make a"
            f" {model_class.__name__} of its config.json ({type(error).__name__}:"
            f" {describe_error(error)}). Compare it with the checkpoint's original"
        ) from error
    described = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    stored = sum(value.numel() for value in state.values())
    if described > 2 * stored + SPARE_WEIGHTS:
        raise CheckpointError(
            f"{owner}: its config.json describes a {model_class.__name__} of {described:,} weights,"
            f" its files hold {stored:,}. Compare it with the checkpoint's original"
        )
