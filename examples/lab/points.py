"""The point-cloud expert, a class unknown to transformers.

Its encoder is registered with mmerge as a user would do it.

Its checkpoint is a LLaMA with a few tensors more: `point_encoder.…` and the connector
`modal_projectors.point.…`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lab.sizes import Size
from mmerge.manifests.errors import PromptError
from mmerge.pipeline import Part
from mmerge.workers.modalities.encoders import EncoderRequest, register_encoder
from mmerge.workers.modalities.media_files import read_array

NUM_GROUPS = 8
GROUP_POINTS = 32
ENCODER, CONNECTOR = "point_encoder.", "modal_projectors.point."


class PointEncoder(nn.Module):
    """A small PointNet over groups of points, and a transformer over the groups.

    Maps [clouds, points, 3] to [clouds, groups, width].

    The centres of the groups are the farthest points, begun with the one farthest from the middle,
    so nothing is drawn at random.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Linear(6, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.places = nn.Linear(3, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, clouds: Tensor) -> Tensor:
        """See the class."""
        centres = _farthest_points(clouds)
        near = torch.cdist(centres, clouds).topk(GROUP_POINTS, largest=False).indices
        rows = torch.arange(len(clouds), device=clouds.device)[:, None, None]
        groups = clouds[rows, near]
        seen = torch.cat([groups - centres[:, :, None], groups], dim=-1)
        return self.blocks(self.points(seen).amax(2) + self.places(centres))


def _farthest_points(clouds: Tensor) -> Tensor:
    """Return group centres [clouds, groups, 3] by farthest point sampling."""
    rows = torch.arange(len(clouds), device=clouds.device)
    distances = (clouds - clouds.mean(1, keepdim=True)).square().sum(-1)
    chosen = [distances.argmax(1)]
    distances = torch.full_like(distances, torch.inf)
    while len(chosen) < NUM_GROUPS:
        distances = torch.minimum(
            distances, (clouds - clouds[rows, chosen[-1]][:, None]).square().sum(-1)
        )
        chosen.append(distances.argmax(1))
    return clouds[rows[:, None], torch.stack(chosen, dim=1)]


class PointLlamaForCausalLM(LlamaForCausalLM):
    """A LLaMA with a point encoder and a connector beside it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.point_encoder = PointEncoder(config.point_width, config.point_layers)
        connector = nn.Sequential(
            nn.Linear(config.point_width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.modal_projectors = nn.ModuleDict({"point": connector})

    @staticmethod
    def make_config(base: LlamaConfig, size: Size) -> LlamaConfig:
        """The base's configuration, with what the encoder needs."""
        return LlamaConfig(
            **{
                **base.to_dict(),
                "point_width": size.encoder_hidden,
                "point_layers": size.encoder_layers,
            }
        )


class RegisteredPointEncoder:
    """Encoder and connector of the point-cloud expert for mmerge.

    Maps a cloud to embeddings [groups, hidden].
    """

    modality = "point"

    def __init__(self, request: EncoderRequest) -> None:
        config = json.loads(request.files["config.json"])
        self.encoder = PointEncoder(config["point_width"], config["point_layers"])
        self.connector = nn.Sequential(
            nn.Linear(config["point_width"], request.hidden_size),
            nn.GELU(),
            nn.Linear(request.hidden_size, request.hidden_size),
        )
        for module, prefix in ((self.encoder, ENCODER), (self.connector, CONNECTOR)):
            state = {
                name.removeprefix(prefix): value
                for name, value in request.state.items()
                if name.startswith(prefix)
            }
            module.load_state_dict(state)
            module.to(request.device, torch.float32).eval()
        self.device = request.device

    def encode(self, part: Part) -> Tensor:
        """Return embeddings of a cloud [points, 3], given as an array or an .npy file.

        Raises PromptError for anything else.
        """
        return self.connector(self.encoder(read_cloud(part.value)[None].to(self.device)))[0]


def read_cloud(value: Any) -> Tensor:
    """Return a point cloud [points, 3] as float32, from an array, a tensor or an .npy file.

    Raises PromptError.
    """
    if isinstance(value, (str, Path)):
        value = read_array(
            value, what="a point cloud", remedy="Give an array [points, 3] saved by numpy.save"
        )
    points = torch.as_tensor(value)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < GROUP_POINTS:
        raise PromptError(
            f"a point cloud has shape {tuple(points.shape)}; give at least {GROUP_POINTS} points,"
            " (points, 3)"
        )
    return points.to(torch.float32)


def register() -> None:
    """Let composites loaded from now on, in this process, read point clouds."""
    register_encoder("point", RegisteredPointEncoder)
