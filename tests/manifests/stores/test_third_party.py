"""The example of docs/storage.md, installed as a package with an entry point, is a store."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mmerge.manifests.errors import StoreError
from mmerge.manifests.stores import open as open_module
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.manifests.testing import StoreConformance


def install(folder: Path, *, entry_points: str, module: str = "") -> None:
    """Lay out an installed package with one module and entry points of the stores' group."""
    (folder / "mmerge_sqlite.py").write_text(module)
    metadata = folder / "mmerge_sqlite-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mmerge-sqlite\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which packages are found."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mmerge_sqlite", raising=False)
    open_module._third_party_stores.cache_clear()
    return folder


class TestDocumentedStore(StoreConformance):
    @pytest.fixture
    def store(self, site: Path, tmp_path: Path, repository: Path) -> Store:
        page = (repository / "docs" / "storage.md").read_text()
        module, suite = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        (entry_points,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
        entry_points = entry_points.replace('project.entry-points."mmerge.stores"', "mmerge.stores")
        install(site, entry_points=entry_points.replace('"', ""), module=module)
        compile(suite, "docs/storage.md", "exec")
        return open_store(f"sqlite://{tmp_path}/objects.db", create=True)


def test_an_entry_point_that_cannot_be_imported_is_named(site: Path) -> None:
    install(site, entry_points="[mmerge.stores]\nsqlite = mmerge_sqlite:Missing\n")
    with pytest.raises(
        StoreError, match=r"the store 'mmerge_sqlite:Missing' .* cannot be imported"
    ):
        open_store("sqlite://x")


def test_an_entry_point_that_is_no_store_is_named(site: Path) -> None:
    install(
        site, entry_points="[mmerge.stores]\nsqlite = mmerge_sqlite:Thing\n", module="Thing = int\n"
    )
    with pytest.raises(StoreError, match="registered for sqlite://, is no ReadableStore class"):
        open_store("sqlite://x")
