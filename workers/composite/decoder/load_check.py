"""Compare a composite with the classes of its experts while it is loaded.

One small prompt of text and an input goes through the expert's class and through the composite,
both with the first layers of the composite's language model. So a class whose decoder takes what is
not carried over is an error at load, not a wrong answer. The cost is two passes of the encoder and
of a few layers; no weights are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmerge.manifests.errors import CheckpointError, MmergeError, first_line
from mmerge.workers.composite.decoder.class_twin import make_class_twin
from mmerge.workers.composite.decoder.composer import PromptComposer
from mmerge.workers.composite.decoder.passes import decoder_inputs
from mmerge.workers.composite.decoder.prompt_inputs import PromptInputs, to_batch
from mmerge.workers.composite.routing import Routing
from mmerge.workers.modalities.decoder_inputs import find_decoder
from mmerge.workers.modalities.processor_encoder import MediaEncoder, add_text, keep_tokens
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.text_rules import TextRules

NUM_TEXT = 2
"""Text tokens on either side of the input."""
_TOLERANCES = {torch.float32: 2e-3}
_LOW_PRECISION = 0.1
"""Largest difference of the logits of one token, relative to their norm.

In bfloat16 other kernels of attention differ by a hundredth; a wrong position or mask by more than
the norm itself.
"""
_WAY_OUT = (
    "Use that expert as its own class, from 'mmerge export --expert'. 'check=False' (--no-check)"
    " loads classes that are known without the comparison"
)


def compare_with_class(
    language_model: Any,
    composer: PromptComposer,
    routing: Routing,
    *,
    expert: str,
    rules: TextRules,
) -> None:
    """Raise CheckpointError where the composite answers otherwise than an expert's own class.

    Args:
        language_model: of the composite, loaded.
        composer, routing: of the composite.
        expert: its name. One whose encoder is not its own class's is not compared, nor one of a
            modality of which no sample can be made.
        rules: of the composite, by which logits are scaled.
    """
    encoder = composer.encoders[expert]
    sample = make_sample(encoder.modality)
    if not isinstance(encoder, MediaEncoder) or sample is None:
        return
    name = type(encoder.model).__name__
    try:
        with torch.inference_mode():
            difference = _compare(
                language_model,
                composer,
                routing,
                encoder=encoder,
                sample=replace(sample, kind=expert),
                rules=rules,
            )
    except CheckpointError:
        raise
    except Exception as error:  # model code of transformers raises anything
        text = first_line(error) if isinstance(error, MmergeError) else repr(error)
        raise CheckpointError(
            f"expert {expert!r}: the composite cannot be compared with {name} ({text}). {_WAY_OUT}"
        ) from error
    tolerance = _TOLERANCES.get(language_model.dtype, _LOW_PRECISION)
    if not difference < tolerance:
        raise CheckpointError(
            f"expert {expert!r}: a small prompt of {encoder.modality} and text has other logits in"
            f" the composite than in {name}: they differ by {difference:.2g} of their norm,"
            f" expected below {tolerance:g}. The class computes what a composite does not carry"
            f" over. {_WAY_OUT}"
        )


def make_sample(modality: str) -> Part | None:
    """Return a small input, None for a modality that is neither image, audio nor video."""
    rows, columns = np.mgrid[0:64, 0:96]
    picture = np.stack([rows * 3, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    if modality == "image":
        return Part("image", Image.fromarray(picture))
    if modality == "audio":
        wave = np.sin(np.arange(16_000) / 20).astype(np.float32)
        return Part("audio", wave, 16_000)
    if modality == "video":
        return Part("video", np.stack([np.roll(picture, 8 * step, axis=1) for step in range(8)]))
    return None


def _compare(
    language_model: Any,
    composer: PromptComposer,
    routing: Routing,
    *,
    encoder: MediaEncoder,
    sample: Part,
    rules: TextRules,
) -> float:
    """Return the largest difference of the logits of one token, relative to their norm."""
    text = Part("ids", [encoder.text_id] * NUM_TEXT)
    prompt = composer.compose([text, sample, text])
    num_layers = _count_layers(language_model, prompt)
    batch, mask = to_batch([prompt])
    with (
        _first_layers(language_model, num_layers),
        routing.prefill(batch.ids),
        decoder_inputs(language_model, batch, mask),
    ):
        logits = language_model(
            inputs_embeds=batch.embeds, attention_mask=mask, use_cache=False
        ).logits[0]
    twin = make_class_twin(encoder, language_model, num_layers=num_layers)
    arguments = _to_arguments(encoder, sample, before=[*composer.leading_ids(), *text.value])
    with routing.prefill(batch.ids), _text_embeddings(twin, prompt):
        expected = twin(**arguments, use_cache=False).logits[0]
    factor = encoder.text_rules.factor_to(rules)
    expected = expected.float() * (1.0 if factor is None else factor)
    if expected.shape != logits.shape:
        return float("inf")
    difference = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.max())


def _count_layers(language_model: Any, prompt: PromptInputs) -> int:
    """Return how many layers show one of each kind, and all that inputs are added to."""
    config = language_model.config
    kinds = list(getattr(config, "layer_types", None) or ())
    needed = [kinds.index(kind) + 1 for kind in set(kinds)]
    return int(min(config.num_hidden_layers, max([1, len(prompt.layer_embeds), *needed])))


@contextmanager
def _first_layers(language_model: Any, count: int) -> Iterator[None]:
    """Run a language model with its first layers alone inside the context."""
    decoder = find_decoder(language_model)
    layers, config = decoder.get_submodule("layers"), language_model.config
    whole = config.num_hidden_layers
    assert isinstance(layers, nn.ModuleList)
    decoder._modules["layers"] = layers[:count]
    config.num_hidden_layers = count
    try:
        yield
    finally:
        decoder._modules["layers"] = layers
        config.num_hidden_layers = whole


def _to_arguments(
    encoder: MediaEncoder, sample: Part, *, before: list[int]
) -> dict[str, torch.Tensor]:
    """Return the arguments of the class for text, the sample and text."""
    inputs = encoder.make_inputs(sample)
    keep = encoder.inputs.without_frame(inputs["input_ids"][0])
    arguments = add_text(
        keep_tokens(inputs, keep), encoder.text_id, before=len(before), behind=NUM_TEXT
    )
    arguments["input_ids"][0, : len(before)] = torch.tensor(before)
    return arguments


@contextmanager
def _text_embeddings(twin: Any, prompt: PromptInputs) -> Iterator[None]:
    """Give a class the composite's embeddings of text, which its own may differ from."""

    def exchange(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        is_text = (prompt.ids < 0).to(output.device)
        return torch.where(is_text[None, :, None], prompt.embeds.to(output.dtype), output)

    handle = twin.get_input_embeddings().register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()
