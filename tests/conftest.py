"""Fixtures that several folders of tests share: tiny checkpoints of the real layouts, recipes over them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("MMERGE_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    if not (GOLDEN / "cases.json").is_file():
        pytest.skip(f"no golden data at {GOLDEN} (set MMERGE_GOLDEN)")
    return GOLDEN
