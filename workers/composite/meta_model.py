"""A transformers model without weights: parameters on the meta device, buffers as the model
computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmerge.manifests.errors import CheckpointError, MmergeError

_meta_lock = Lock()


def find_text_class(text: Any, *, owner: str) -> Any:
    """Return the causal language model of a text configuration. Raises CheckpointError for those
    that transformers lacks.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if model_class is None:
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} has no causal language model for"
            f" {text.model_type!r}"
        )
    return model_class


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make parameters without memory or values inside; buffers (the rotary frequencies, which no
    checkpoint holds) are computed.

    Drawing first values of parameters that have no memory would still take milliseconds per layer.
    Other threads make modules as ever meanwhile; one thread at a time is inside.
    """
    own_thread = get_ident()
    # What is replaced is looked up behind it: another thread's replacement would be put back for
    # good
    with _meta_lock:
        register, init_weights = (
            nn.Module.register_parameter,
            transformers.PreTrainedModel.init_weights,
        )
        drawing = {each: each.reset_parameters for each in (nn.Linear, nn.Embedding)}

        def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            # Tied ones must stay the same object.
            is_new = get_ident() == own_thread and param is not None and not param.is_meta
            register(
                module,
                name,
                (
                    nn.Parameter(param.to("meta"), requires_grad=False)
                    if is_new and param is not None
                    else param
                ),
            )

        def tie_alone(model: transformers.PreTrainedModel) -> None:
            model.tie_weights() if get_ident() == own_thread else init_weights(model)

        nn.Module.register_parameter = register_meta  # type: ignore[method-assign, assignment]
        transformers.PreTrainedModel.init_weights = tie_alone
        for each, draw in drawing.items():
            each.reset_parameters = _only_elsewhere(draw, own_thread)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for each, draw in drawing.items():
                each.reset_parameters = draw  # type: ignore[method-assign]
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            transformers.PreTrainedModel.init_weights = init_weights


def _only_elsewhere(draw: Callable[[Any], None], thread: int) -> Callable[[Any], None]:
    """Return a function that does what `draw` does on other threads than this one, on it nothing."""

    def draw_elsewhere(module: Any) -> None:
        if get_ident() != thread:
            draw(module)

    return draw_elsewhere


def make_skeleton(text: Any, *, dtype: torch.dtype, owner: str) -> Any:
    """Return the causal language model of a text configuration, its parameters on the meta device.

    Raises:
        CheckpointError: transformers has no such model, or cannot make it of these numbers.
    """
    try:
        with _parameters_on_meta(), _default_dtype(dtype):
            return find_text_class(text, owner=owner)(text).eval()
    except MmergeError:
        raise
    except (
        Exception
    ) as error:  # whatever the code behind a model type stumbles over is said by its configuration
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise CheckpointError(
            f"{owner}: transformers {transformers.__version__} cannot make a {text.model_type}"
            f" model of its config.json ({type(error).__name__}: {reason}). Compare it with the"
            " checkpoint's original, or install the transformers that wrote it"
        ) from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def set_parameter(
    model: nn.Module, name: str, value: torch.Tensor, *, shape: tuple[int, ...]
) -> None:
    """Put a tensor, or a part of it, in the place of a parameter. Raises CheckpointError when the
    whole's `shape` is not the parameter's.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    wanted = tuple(module.get_parameter(last).shape)
    if wanted != shape:
        raise CheckpointError(
            f"{name}: has shape {shape}, the model of transformers {transformers.__version__} has"
            f" {wanted}"
        )
    setattr(module, last, nn.Parameter(value, requires_grad=False))
