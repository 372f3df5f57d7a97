"""Merge published mergekit YAMLs with mergekit and with mmerge, and compare what they write.

mergekit is a program of its own in an environment of its own (`make bench-peers` makes it); nothing
of it is imported here. Run from the repository:

    python benchmarks/peer_yamls.py --mergekit .venv-peers/bin/mergekit-yaml

With --golden FILE what mergekit wrote is stored for tests/pipeline/recipes/test_published_yamls.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors.torch import save_file

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.exports.checkpoint import export

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from published_yamls import (  # noqa: E402 - needs the folder of the tests
    FEATURES,
    PUBLISHED,
    Output,
    Yaml,
    asks_for_tokens,
    count_units,
    make_models,
    read_output,
    to_compared,
)

_RUN_ALL = """
import sys
from importlib.metadata import entry_points
(point,) = entry_points(group="console_scripts", name="mergekit-yaml")
program = point.load()
names = sys.argv[1:]
for config, output in zip(names[::2], names[1::2]):
    options = ["--quiet", "--no-cuda", "--no-write-model-card", "--lora-merge-cache", "adapters"]
    try:
        program([*options, config, output], standalone_mode=False)
    except Exception as error:
        print("refused", output, type(error).__name__, " ".join(str(error).split())[:120])
"""
"""Runs mergekit's command on several files in one process: importing torch takes most of a run."""


def run_mergekit(mergekit: Path, folder: Path, yamls: Mapping[str, Yaml]) -> None:
    """Write what mergekit makes of every YAML to theirs-NUMBER; no folder where it refuses."""
    names = []
    for number, item in enumerate(yamls.values()):
        path = folder / f"{number}.yml"
        path.write_text(yaml.safe_dump(to_compared(item), sort_keys=False))
        names += [path.name, f"theirs-{number}"]
    subprocess.run(
        [str(mergekit.parent / "python"), "-c", _RUN_ALL, *names],
        cwd=folder,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def merge_here(folder: Path, number: int) -> str:
    """Write what mmerge makes of a YAML to ours-NUMBER; returns why it refuses, empty if not."""
    try:
        run(make_plan(read_recipe(folder / f"{number}.yml")))
        export(str(folder / f"{number}-composite"), folder / f"ours-{number}")
    except MmergeError as error:
        return Exception.__str__(error)
    return ""


def describe(ours: Output, theirs: Output) -> str:
    """Return the difference of two outputs in words, empty where they are equal."""
    facts = [
        f"{key}: {ours.facts[key]!r}, mergekit {value!r}"
        for key, value in theirs.facts.items()
        if ours.facts[key] != value
    ]
    if ours.entries.shape != theirs.entries.shape or ours.entries.dtype != theirs.entries.dtype:
        facts.append(f"entries: {ours.entries.shape} {ours.entries.dtype}")
    elif count_units(ours.entries, theirs.entries) > 1:
        facts.append(f"{count_units(ours.entries, theirs.entries):.3g} units in the last place")
    return "; ".join(facts)


def main() -> int:
    """Compare all YAMLs; returns 1 if one differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=ROOT / ".venv-peers" / "bin" / "mergekit-yaml",
        help="the program to compare with",
    )
    parser.add_argument("--golden", type=Path, help="where to store what mergekit wrote")
    arguments = parser.parse_args()
    if not arguments.mergekit.exists():
        print(f"skipped: {arguments.mergekit} is not installed (make bench-peers)")
        return 0
    yamls = {**PUBLISHED, **FEATURES}
    num_different = 0
    golden, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder)
        run_mergekit(arguments.mergekit.absolute(), folder, yamls)
        for number, (label, item) in enumerate(yamls.items()):
            refusal = merge_here(folder, number)
            if not (folder / f"theirs-{number}" / "config.json").exists():
                print(f"{label}: mergekit refuses; here: {refusal or 'merged'}")
                num_different += not item.mergekit_refuses
                continue
            if refusal:
                print(f"{label}: refused here: {refusal}")
                num_different += not item.refusal
                continue
            with_tokens = asks_for_tokens(to_compared(item))
            theirs = read_output(folder / f"theirs-{number}", with_tokens=with_tokens)
            ours = read_output(folder / f"ours-{number}", with_tokens=with_tokens)
            difference = describe(ours, theirs)
            num_different += bool(difference)
            print(f"{label}: {difference or 'equal'}")
            golden[label] = theirs.entries
            facts[label] = json.dumps(theirs.facts)
    if arguments.golden:
        save_file(golden, arguments.golden, metadata=facts)
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
