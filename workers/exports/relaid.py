"""Mixtures of experts in the layout that an expert's class saves, from a build in the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mmerge.manifests.errors import CheckpointError, ManifestError
from mmerge.workers.families.fused_parameters import ParameterLayout, find_layouts
from mmerge.workers.families.name_map import (
    UnknownClass,
    list_memory_names,
    map_names,
    to_saved_form,
)

Rebuild = Callable[[str], torch.Tensor]
"""Returns a tensor of the expert by its name in the base."""


class ExpertLayout:
    """Which tensors of a build are parts of parameters that an expert's class saves otherwise."""

    def __init__(
        self,
        base_config: Mapping[str, Any],
        expert_config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compare the classes of base and expert.

        Args:
            base_config: config.json of the base.
            expert_config: that of the expert.
            shapes: of the build's tensors by name.

        Raises:
            ManifestError: the installed transformers cannot make one of the classes.
        """
        self._config = expert_config
        try:
            layouts = find_layouts(map_names(base_config, shapes), shapes)
            self._memory_names = list_memory_names(expert_config)
        except UnknownClass as error:
            raise ManifestError(
                "the expert's mixtures of experts are stored in the base's layout, and that of its"
                f" own class is unknown: {Exception.__str__(error)}. Install the release of"
                " transformers that the build was made with"
            ) from error
        self._layouts = {
            canonical: layout
            for canonical, layout in layouts.items()
            if _is_fused(layout) and canonical in self._memory_names
        }
        self.names = {name for layout in self._layouts.values() for name in layout.regions}
        """Names of the build's tensors that `iterate` yields in another form."""

    def iterate(self, rebuild: Rebuild) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that the expert's class saves instead of those in `names`."""
        for canonical, layout in self._layouts.items():
            parameter = _assemble(layout, rebuild)
            try:
                saved = to_saved_form(self._config, self._memory_names[canonical], parameter)
            except CheckpointError as error:
                raise ManifestError(
                    f"{canonical}: cannot be written as the expert's class saves it:"
                    f" {Exception.__str__(error)}"
                ) from error
            yield from saved.items()


def _is_fused(layout: ParameterLayout) -> bool:
    """Return whether a parameter is one that files hold in several ways."""
    return len(layout.regions) > 1 or len(layout.shape) == 3


def _assemble(layout: ParameterLayout, rebuild: Rebuild) -> torch.Tensor:
    """Return a parameter as it is in memory."""
    rows = []
    regions = sorted(layout.regions.items(), key=lambda item: item[1].first_row)
    for name, region in regions:
        value = rebuild(name)
        rows.append(value.transpose(1, 2) if region.is_transposed else value)
    if len(rows) == 1:
        return rows[0].reshape(layout.shape).contiguous()
    return torch.cat([value.reshape(-1, layout.columns) for value in rows]).reshape(layout.shape)
