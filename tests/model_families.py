"""Tiny random models of real transformers classes, and the language model inside each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.model_configs import BASE_ROWS, LANGUAGE_MODELS, SIZES, MultimodalFamily


def make_language_model(kind: str, *, rows: int = BASE_ROWS, **values: Any) -> Any:
    """Return a plain language model with every parameter random."""
    settings = {**SIZES, "vocab_size": rows, **LANGUAGE_MODELS[kind], **values}
    config = tf.AutoConfig.for_model(kind, **settings)
    return randomise(tf.AutoModelForCausalLM.from_config(config), seed=1)


def make_base(family: MultimodalFamily) -> Any:
    """Return the plain language model under a multimodal family."""
    return make_language_model(family.base, rows=family.base_rows, **family.base_values)


def make_multimodal(family: MultimodalFamily, *, seed: int) -> Any:
    """Return a multimodal model with every parameter random."""
    return randomise(getattr(tf, family.class_name)(family.make_config()), seed=seed)


def randomise(model: Any, *, seed: int) -> Any:
    """Return a model in evaluation mode with every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else 0.8 + 0.2 * noise)
    model.tie_weights()
    return model.eval()


def tune(model: Any, *, seed: int) -> Any:
    """Return a copy of a model with noise on every parameter."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tuned.tie_weights()
    return tuned


def language_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a model's language model in memory, by one name for all classes.

    Written without the package's own name map: found by walking the modules.
    """
    decoder = model.get_decoder()
    if hasattr(decoder, "model") and hasattr(decoder, "lm_head"):
        decoder = decoder.model
    text = model.config.get_text_config()
    cross = set(getattr(text, "cross_attention_layers", None) or ())
    own_layers = [layer for layer in range(text.num_hidden_layers) if layer not in cross]
    parameters = {}
    for name, value in decoder.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "layers":
            number, _, rest = rest.partition(".")
            if int(number) in cross:
                continue
            name = f"layers.{own_layers.index(int(number))}.{rest}"
        parameters[name] = value
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        parameters |= {f"lm_head.{name}": value.data for name, value in head.named_parameters()}
    return parameters


def give_language_model(base: Any, expert: Any, *, seed: int) -> None:
    """Write the base's parameters plus noise into the language model of an expert, rows first."""
    targets = language_parameters(expert)
    generator = torch.Generator().manual_seed(seed)
    for name, value in language_parameters(base).items():
        noise = 0.05 * torch.randn(value.shape, generator=generator)
        targets[name][: len(value)] = value + noise
    expert.tie_weights()


def save(model: Any, folder: Path) -> Path:
    """Write a checkpoint as transformers does, and return its folder."""
    model.save_pretrained(folder)
    return folder
