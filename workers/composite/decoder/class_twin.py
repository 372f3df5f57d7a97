"""An expert's own class with the first layers of a composite's language model.

Nothing is copied: the class is made on the meta device and takes the encoder's and the composite's
tensors, and its Linear layers are the composite's, so that a token has the same weights in both.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.composite.meta_model import compute_buffers
from mmerge.workers.modalities.decoder_inputs import find_decoder
from mmerge.workers.modalities.processor_encoder import MediaEncoder


def make_class_twin(encoder: MediaEncoder, language_model: Any, *, num_layers: int) -> Any:
    """Return the class of an expert, in evaluation mode.

    Raises:
        CheckpointError: its layers have parameters that those of the composite lack.
    """
    config = copy.deepcopy(encoder.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(text.layer_types)[:num_layers]
    with torch.device("meta"):
        twin = type(encoder.model)(config)
    _share_tensors(twin, encoder.model)
    decoder, other = find_decoder(twin), find_decoder(language_model)
    embedding = language_model.get_input_embeddings()
    for name, module in other.named_children():
        is_layers = isinstance(module, nn.ModuleList)
        if not is_layers and module is not embedding and any(True for _ in module.parameters()):
            _share_module(decoder.get_submodule(name), module, owner=encoder.expert, path=name)
    layers: Any = decoder.get_submodule("layers")
    other_layers: Any = other.get_submodule("layers")
    for index in range(num_layers):
        path = f"layer {index}"
        _share_module(layers[index], other_layers[index], owner=encoder.expert, path=path)
    _replace(twin, twin.get_output_embeddings(), language_model.get_output_embeddings())
    compute_buffers(twin)
    return twin.eval()


def _share_tensors(twin: nn.Module, model: nn.Module) -> None:
    """Give a model the parameters and buffers that another has under the same names."""
    buffers = dict(model.named_buffers())
    for name, value in [*model.named_parameters(), *buffers.items()]:
        path, _, last = name.rpartition(".")
        module = twin.get_submodule(path)
        if name in buffers:
            module._buffers[last] = value
        else:
            setattr(module, last, nn.Parameter(value.data, requires_grad=False))


def _share_module(module: nn.Module, other: nn.Module, *, owner: str, path: str) -> None:
    """Give a module the parameters of another, and its Linear layers."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = other._parameters.get(name)
        if value is None or value.shape != parameter.shape:
            raise CheckpointError(
                f"expert {owner!r}: its class has {path}.{name} {tuple(parameter.shape)}, the"
                " language model of the composite has"
                f" {'none' if value is None else tuple(value.shape)}"
            )
        module._parameters[name] = value
    for name, child in list(module.named_children()):
        inner = other._modules.get(name)
        if inner is None:
            raise CheckpointError(
                f"expert {owner!r}: its class has {path}.{name}, the language model of the"
                " composite has none"
            )
        if isinstance(child, nn.Linear):
            module._modules[name] = inner
        else:
            _share_module(child, inner, owner=owner, path=f"{path}.{name}")


def _replace(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                parent._modules[name] = replacement
