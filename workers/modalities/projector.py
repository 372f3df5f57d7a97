"""Connectors of experts without an encoder in their files: from features to embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.modalities.media_files import read_array
from mmerge.workers.modalities.prompt import Part

_LINEAR = re.compile(
    r"(?:^|\.)modal_projectors\.(?P<modality>[^.]+)\.(?:(?P<index>[0-9]{1,9})\.)?"
    r"(?P<kind>weight|bias)$"
)
_TOKENS = re.compile(r"(?:^|\.)(?P<place>prefix|suffix)_tokens\.(?P<modality>[^.]+)$")


class FeatureEncoder:
    """Turns features of a modality into embeddings by a connector and learned tokens.

    As in the official Model Composition code (arXiv 2402.12750): the connector is one Linear layer,
    or several with GELU in between; without one the features are embeddings already. Learned prefix
    and suffix tokens count as tokens of the modality.
    """

    def __init__(
        self,
        *,
        expert: str,
        modality: str,
        state: Mapping[str, torch.Tensor],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the encoder of an expert from its copied tensors, by name.

        Raises:
            CheckpointError: the connector has layers other than Linear.
        """
        self.expert, self.modality, self.dtype, self.device = expert, modality, dtype, device
        self.hidden_size = hidden_size
        self.layers: dict[int, dict[str, torch.Tensor]] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            linear, tokens = _LINEAR.search(name), _TOKENS.search(name)
            if linear:
                layer = self.layers.setdefault(int(linear["index"] or 0), {})
                layer[linear["kind"]] = value.to(device, dtype)
            elif tokens and value.numel():
                self.tokens[tokens["place"]] = value.reshape(-1, hidden_size).to(device, dtype)
            elif "modal_projectors." in name:
                raise CheckpointError(
                    f"expert {expert!r}: {name}: only connectors of Linear layers are read"
                )
        for layer in self.layers.values():
            if layer.get("weight") is None or layer["weight"].ndim != 2:
                raise CheckpointError(
                    f"expert {expert!r}: its connector has a layer that is no Linear; only"
                    " connectors of Linear layers are read"
                )

    @torch.inference_mode()
    def encode(self, part: Part) -> torch.Tensor:
        """Return the embeddings of features [tokens, width], [tokens, hidden].

        The features are an array, a tensor or an .npy file.

        Raises:
            PromptError: the features cannot be read, or do not have the width of the connector.
        """
        values = self._read(part.value)
        for position, index in enumerate(sorted(self.layers)):
            layer = self.layers[index]
            if values.shape[-1] != layer["weight"].shape[1]:
                raise PromptError(
                    f"{part.kind}: features have width {values.shape[-1]}, the connector of expert"
                    f" {self.expert!r} takes {layer['weight'].shape[1]}"
                )
            inputs = nn.functional.gelu(values) if position else values
            values = nn.functional.linear(inputs, layer["weight"], layer.get("bias"))
        if values.shape[-1] != self.hidden_size:
            raise PromptError(
                f"{part.kind}: embeddings have width {values.shape[-1]}, the language model's have"
                f" {self.hidden_size}"
            )
        pieces = [self.tokens.get("prefix"), values, self.tokens.get("suffix")]
        return torch.cat([piece for piece in pieces if piece is not None])

    def _read(self, value: object) -> torch.Tensor:
        if isinstance(value, (str, Path)):
            remedy = (
                f"Expert {self.expert!r} has no encoder in its files: give the output of its"
                " encoder, an array [tokens, width] saved by numpy.save"
            )
            value = read_array(value, what="features", remedy=remedy)
        if isinstance(value, np.ndarray):
            value = _to_tensor(value)
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
            shape = tuple(getattr(value, "shape", ())) or type(value).__name__
            raise PromptError(
                f"expert {self.expert!r} takes features, a float array [tokens, width], not {shape}"
            )
        if not torch.isfinite(value).all():
            raise PromptError(f"the features for expert {self.expert!r} are NaN or infinite")
        converted = value.to(self.device, self.dtype)
        if not torch.isfinite(converted).all():
            largest = float(value.abs().max())
            raise PromptError(
                f"the features for expert {self.expert!r} reach {largest:g}, more than"
                f" {str(self.dtype).removeprefix('torch.')} holds ({torch.finfo(self.dtype).max:g})"
            )
        return converted


def _to_tensor(array: np.ndarray[Any, Any]) -> object:
    """Return an array as a tensor; as it is where torch has no such dtype."""
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError:
        return array
