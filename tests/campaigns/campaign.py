"""What the campaigns share: a small recipe, the command in processes of its own, a strict check.

Campaigns try random moments for minutes or hours. They are no part of the suite.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from blake3 import blake3
from warm_command import Command, start_warm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import Lab

UNEXPECTED = "This is a fault of mmerge"
"""Words of the message of an error that nobody thought of."""
LONG_AGO = 20 * 60
"""Seconds by which the times of a store are set back: a lease of that age is stale."""
SECONDS_OF_A_COMMAND = 300.0


@dataclass
class Campaign:
    """Points that were tried, and what went wrong at them."""

    name: str
    folder: Path
    faults: list[str] = field(default_factory=list)
    num_points: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    truth: dict[str, str] = field(default_factory=dict)
    """Digest of every object of clean builds, by key."""
    meanings: dict[tuple[str, str], str] = field(default_factory=dict)
    """Build by store and reference key; it never changes while the store exists."""

    def begin_point(self) -> Path:
        """Count a new point; return the folder of its store, which does not exist."""
        store = self.folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        self.meanings.clear()
        self.num_points += 1
        return store

    def count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def fail(self, fault: str) -> None:
        self.faults.append(fault)
        print(f"FAULT {fault}", flush=True)  # noqa: T201

    def finish(self) -> int:
        """Print the summary line; return the exit code."""
        counts = ", ".join(f"{outcome} {count}" for outcome, count in sorted(self.counts.items()))
        print(  # noqa: T201
            f"{self.name}: {self.num_points} points, {len(self.faults)} faults ({counts})"
        )
        return 1 if self.faults else 0


@contextmanager
def open_campaign(name: str) -> Iterator[tuple[Campaign, dict[str, object]]]:
    """Yield a campaign in a folder that is deleted at the end, and a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(name, Path(folder))
        yield campaign, make_models(campaign.folder / "models")


def make_parser(description: str | None, *, count: str, default: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every campaign has: how many points, and the seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(count, type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def make_models(folder: Path, *, hidden: int = 128, layers: int = 3) -> dict[str, object]:
    """Write a base and two experts whose merge takes a moment; return a recipe over them."""
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder)
    lab.config |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "head_dim": hidden // 4,
        "vocab_size": 256,
    }
    return lab.make_all(2)


def write_recipe(
    campaign: Campaign,
    recipe: dict[str, object],
    store: Path,
    *,
    name: str = "omni",
    **options: object,
) -> Path:
    """Write a recipe into the folder of the models and return its path."""
    path = campaign.folder / "models" / f"{name}-{random.getrandbits(32):08x}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"name": name, "output": str(store)} | options))
    return path


def start(*arguments: str, environment: dict[str, str] | None = None) -> Command:
    """Start the command in a session of its own."""
    return start_warm(*arguments, environment=environment or {})


def call(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the command to its end; return its exit code and its output."""
    return wait(start(*arguments, environment=environment))


def wait(command: Command) -> tuple[int, str]:
    """Return the exit code and the output of a started command; kill it if it hangs."""
    output = command.wait(SECONDS_OF_A_COMMAND)
    if output is None:
        os.killpg(command.pid, signal.SIGKILL)
        return -9, f"{command.wait(SECONDS_OF_A_COMMAND) or ''}\nhung"
    return command.returncode or 0, output


def is_unexpected(code: int, output: str) -> bool:
    """Return whether a command ended in another way than with success or an explained error."""
    return code not in (0, 1) or UNEXPECTED in output or "Traceback" in output


def last_line(output: str) -> str:
    """Return the last line of an output, with the one before it where that has the reason."""
    lines = [line for line in output.splitlines() if line.strip()]
    count = 2 if UNEXPECTED in output else 1
    return " ".join(lines[-count:])[:600]


def grow_old(store: Path, seconds: float = LONG_AGO) -> None:
    """Set the time of everything in a store back, so that leases are stale."""
    for path in store.rglob("*"):
        if path.is_file():
            try:
                then = path.stat().st_mtime - seconds
                os.utime(path, (then, then))
            except FileNotFoundError:
                continue  # renamed meanwhile


def learn_truth(campaign: Campaign, recipe: dict[str, object], **options: object) -> None:
    """Build a recipe into an empty store, and keep the digests of all objects."""
    store = campaign.folder / "truth"
    shutil.rmtree(store, ignore_errors=True)
    code, output = call(
        "run", str(write_recipe(campaign, recipe, store, **options)), "--executor", "serial"
    )
    assert code == 0, output
    for path in store.glob("objects/*.safetensors"):
        campaign.truth[f"objects/{path.name}"] = blake3(path.read_bytes()).hexdigest()


def check_store(campaign: Campaign, store: Path, *, where: str) -> None:
    """Record every wrong object, every second meaning, and every unreadable build of a name."""
    for path in store.glob("objects/*.safetensors"):
        true_digest = campaign.truth.get(f"objects/{path.name}")
        if true_digest not in (None, blake3(path.read_bytes()).hexdigest()):
            campaign.fail(f"{where}: {path.name} has other bytes than a clean build's")
    for path in store.glob("refs/*/*.json"):
        if path.with_suffix(".deleted").exists():
            continue
        key = str(path.relative_to(store))
        build = json.loads(path.read_text())["build"]
        if campaign.meanings.setdefault((str(store), key), build) != build:
            campaign.fail(f"{where}: {key} has two meanings")
        code, output = call("verify", f"{store}#{path.parent.name}@{int(path.stem)}")
        if code:
            campaign.fail(f"{where}: {key} cannot be verified: {last_line(output)}")


def stop(process: Command) -> bool:
    """Suspend all processes of a command; return whether it was still running."""
    try:
        os.killpg(process.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    return True


def let_go_on(process: Command) -> None:
    """Wake a suspended command."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)


def collect(campaign: Campaign, store: Path, generator: random.Random) -> None:
    """Delete garbage, with or without a grace period."""
    code, _ = call("gc", str(store), "--delete", "--grace", generator.choice(("0s", "10m")))
    campaign.count(f"gc {code}")


def check_continued(campaign: Campaign, store: Path, recipe: str, *, where: str) -> None:
    """Check a store, run a recipe in it to the end, and check it again."""
    check_store(campaign, store, where=where)
    code, output = call("run", recipe, "--executor", "serial")
    if code:
        campaign.fail(f"{where}: the run cannot go on: {last_line(output)}")
    check_store(campaign, store, where=f"{where}, continued")


def wait_for(store: Path, process: Command, seconds: float) -> None:
    """Return some time after the run has put its lease, or when it has ended."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if any(store.glob("claims/run-*.json")):
            break
        time.sleep(0.005)
    time.sleep(seconds)


def measure_run(
    campaign: Campaign, recipe: dict[str, object], executor: str, **options: object
) -> float:
    """Return how long a run takes from its lease to its end."""
    store = campaign.folder / f"measured-{executor}"
    process = start(
        "run", str(write_recipe(campaign, recipe, store, **options)), "--executor", executor
    )
    wait_for(store, process, 0.0)
    began = time.monotonic()
    code, output = wait(process)
    assert code == 0, output
    shutil.rmtree(store)
    return time.monotonic() - began
