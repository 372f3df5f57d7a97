"""A recipe file written again with the values that a calibration chose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import is_local
from mmerge.pipeline.evaluation.calibrate import Calibration

_HEADER = "# Mask scales chosen by 'mmerge calibrate' from the experts' own answers.\n"


def write_recipe(
    source: Path, target: Path, calibration: Calibration, *, with_density: bool
) -> None:
    """Write the recipe in `source` with the chosen values to `target`.

    Relative paths are rewritten for the new folder. Comments are not kept.

    Raises:
        RecipeError: the source is a mergekit YAML, or the target cannot be written.
    """
    raw: Any = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("experts"), dict):
        raise RecipeError(
            f"--to: {source} is a mergekit YAML, which has no mask scales. The calibrated values:"
            f" mask_scale {calibration.mask_scales}, density {calibration.density}"
        )
    old_folder, new_folder = source.absolute().parent, target.absolute().parent
    for key in ("base", "output"):
        if isinstance(raw.get(key), str):
            raw[key] = _move_path(raw[key], old_folder, new_folder)
    for name, expert in raw["experts"].items():
        expert["path"] = _move_path(expert["path"], old_folder, new_folder)
        expert["mask_scale"] = calibration.mask_scales[name]
    if with_density:
        raw["density"] = calibration.density
    text = _HEADER + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"--to: {target}: cannot be written ({error.strerror or error})"
        ) from error


def _move_path(uri: str, old_folder: Path, new_folder: Path) -> str:
    """Return a path relative to the old folder as one relative to the new; others unchanged."""
    if not is_local(uri) or uri.startswith("file://") or Path(uri).expanduser().is_absolute():
        return uri
    return os.path.relpath(old_folder / uri, new_folder)
