"""The folder that an export is written to: new or empty, on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from mmerge.manifests.errors import StoreError


def to_export_folder(folder: str | Path) -> Path:
    """Return the path of a folder for an export.

    Raises:
        StoreError: it is a file or a URL, or it is not empty.
    """
    # A Path made from a URL keeps one of its slashes.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise StoreError(
            f"{folder}: an export goes to a folder of this machine. Write it there, and copy the"
            " folder to where it belongs"
        )
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target}: is a file. Choose a new folder for the export")
    if target.exists() and any(target.iterdir()):
        raise StoreError(
            f"{target}: is not empty. Choose a new folder for the export, or delete this one"
        )
    return target
