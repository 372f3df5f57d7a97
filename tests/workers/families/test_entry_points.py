"""A third party's family is found by its entry point; docs/add-a-family.md works as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import EXPERTS, build, is_layer_matrix, write_family
from rank_runs import case, run_and_check

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.families.registry import list_families
from mmerge.workers.reconstruction.build_reader import BuildReader

PAGE = Path(__file__).resolve().parent.parent.parent.parent / "docs" / "add-a-family.md"
MODALITIES = {name: {"path": name, "modality": name} for name in EXPERTS}


def install(folder: Path, *, module: str, entry_point: str) -> None:
    """Write a module and the metadata that pip writes beside it."""
    (folder / "mmerge_phi.py").write_text(module)
    metadata = folder / "mmerge_phi-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mmerge-phi\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[mmerge.families]\n{entry_point}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, of this process and of those that it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(__import__("sys").modules, "mmerge_phi", raising=False)
    list_families.cache_clear()
    yield folder
    list_families.cache_clear()


def page_blocks() -> dict[str, str]:
    """Return the code blocks of the page by their language."""
    return dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


def test_the_family_of_the_page_merges_its_projections_and_loads_on_two_ranks(
    tmp_path: Path, site: Path
) -> None:
    blocks = page_blocks()
    group = '[project.entry-points."mmerge.families"]\n'
    entry_point = blocks["toml"].split(group)[1].splitlines()[0].replace('"', "")
    install(site, module=blocks["python"], entry_point=entry_point)
    tensors = write_family(tmp_path, "phi")
    recipe = {"method": "task_arithmetic", "merge": "linear", "scale": 0.5}
    reader = BuildReader(build(tmp_path, recipe | {"experts": MODALITIES}))
    assert reader.family.name == "phi"
    merged = {name for name, value in tensors.items() if is_layer_matrix(name, value)}
    assert set(reader.names("merged")) == merged
    masks = {"method": "mmer", "output": "masks", "experts": MODALITIES}
    build(tmp_path, masks)
    run_and_check([case(str(tmp_path / "masks"))], tmp_path, 2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("PHI = 3", r"model family 'phi' .*expected a .*Family, got int"),
        ("import no_such_module", r"model family 'phi' .*cannot be imported \(No module named"),
        ("", r"model family 'phi' .*cannot be imported .*Repair or uninstall"),
    ],
)
def test_an_entry_point_that_is_no_family_is_refused_by_its_name(
    site: Path, module: str, message: str
) -> None:
    install(site, module=module, entry_point="phi = mmerge_phi:PHI")
    with pytest.raises(CheckpointError, match=message):
        list_families()
