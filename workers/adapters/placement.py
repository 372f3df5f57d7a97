"""Which tensor of the base a module of an adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from mmerge.workers.adapters.folder import AdapterFolder
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.name_map import UnknownClass, canonical_name, map_names


class ModulePlacer:
    """Finds the weights of a base by the paths that modules have in an adapter's files.

    PEFT writes the paths of the class that it trained: of this or of an earlier release, of the
    whole multimodal class or of its language model alone.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Look for modules in `base`."""
        self._base = base

    def find_weight(self, module: str) -> str | None:
        """Return the base's weight that a module is, None where the base has none.

        By prefixes first, which needs no class; then as transformers names the module in the base's
        own class.
        """
        base = self._base
        name = base.family.find_adapted_weight(module, base.tensors, prefix=base.language_prefix)
        if name is not None or not self._stored_names:
            return name
        return self._stored_names.get(canonical_name(base.config, f"{module}.weight"))

    def place_others(self, folder: AdapterFolder) -> dict[str, TensorSource]:
        """Return what an adapter saved whole, under the base's names where it has the module."""
        placed = {}
        for name, source in folder.others.items():
            module, _, last = name.rpartition(".")
            weight = self.find_weight(module) if module else None
            if weight is not None:
                placed[f"{weight.removesuffix('weight')}{last}"] = source
            else:
                placed[self._find_tensor(name) or name] = source
        return placed

    def _find_tensor(self, name: str) -> str | None:
        """Return the base's tensor of a name that does not end with `weight` or `bias`."""
        if name in self._base.tensors or not self._stored_names:
            return None
        return self._stored_names.get(canonical_name(self._base.config, name))

    @cached_property
    def _stored_names(self) -> Mapping[str, str]:
        """Names of the base's tensors by canonical name; none where transformers has no class."""
        try:
            names = map_names(self._base.config, self._base.tensors).canonical
        except UnknownClass:
            return {}
        return {canonical: stored for stored, canonical in names.items()}
