"""Meta-device models: a transformers model without memory for its parameters."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmerge.manifests.errors import CheckpointError, MmergeError, first_line


def find_text_class(text: Any, *, owner: str) -> Any:
    """Return the causal language model class of a text configuration.

    Raises:
        CheckpointError: transformers has none; `owner` names the model in the message.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if model_class is None:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} has no causal language model for"
            f" {text.model_type!r}"
        )
    return model_class


def make_meta_model(text: Any, *, dtype: torch.dtype, owner: str) -> Any:
    """Return the causal language model of a text configuration, in evaluation mode.

    Its parameters are on the meta device, in `dtype` and without gradients. Its buffers (rotary
    frequencies, which no checkpoint holds) have their values, on the CPU.

    Raises:
        CheckpointError: transformers has no such model, or cannot make it from this configuration.
    """
    try:
        model_class = find_text_class(text, owner=owner)
        with torch.device("meta"):
            model = model_class(text)
        compute_buffers(model)
    except MmergeError:
        raise
    except Exception as error:  # model code of transformers raises anything on odd configurations
        reason = first_line(error)
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} cannot make a {text.model_type}"
            f" model of its config.json ({type(error).__name__}: {reason}). Compare it with the"
            " checkpoint's original, or install the transformers that wrote it"
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    # Settings of generation in a config.json would apply silently; options are given by name.
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def compute_buffers(model: Any) -> None:
    """Give the buffers of a meta-device model their values, as `from_pretrained` does.

    Each starts as NaN, so that one that transformers does not compute is noticed.
    """
    for module in model.modules():
        names = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        for name in names:
            buffer = module.get_buffer(name)
            fill = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, fill, device="cpu"))
        if names:
            model._init_weights(module)
        for name in names:
            if module.get_buffer(name).isnan().any():
                raise ValueError(f"the buffer {name} of {type(module).__name__} has no values")


def set_parameter(
    model: nn.Module, name: str, value: torch.Tensor, *, shape: tuple[int, ...]
) -> None:
    """Put a tensor, or one rank's part of it, in the place of a parameter.

    Raises:
        CheckpointError: `shape`, of the whole tensor, is not the parameter's.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    expected = tuple(module.get_parameter(last).shape)
    if expected != shape:
        raise CheckpointError(
            f"{name}: has shape {shape}, the model of transformers {transformers.__version__} has"
            f" {expected}"
        )
    setattr(module, last, nn.Parameter(value, requires_grad=False))
