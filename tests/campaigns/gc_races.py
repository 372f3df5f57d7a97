"""Runs that are suspended until their lease is stale, against garbage collection.

    .venv/bin/python tests/campaigns/gc_races.py --races 50

The store has older builds whose objects the suspended run reuses, and another run that moves the
name on while it is held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from campaign import (
    Campaign,
    call,
    check_store,
    grow_old,
    is_unexpected,
    last_line,
    learn_truth,
    make_models,
    measure_run,
    start,
    wait,
    wait_for,
    write_recipe,
)

SCALES = (0.5, 0.75, 1.0)
"""Values of `mask_scale`: builds of them share the base and the copied encoders."""


def race(
    campaign: Campaign, recipe: dict[str, object], seconds: float, generator: random.Random
) -> None:
    """Suspend one run at one moment, let others work, and let it go on."""
    store = campaign.folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    campaign.meanings.clear()
    paths = [str(write_recipe(campaign, recipe, store, mask_scale=scale)) for scale in SCALES]
    generator.shuffle(paths)
    campaign.num_points += 1
    where = f"race {campaign.num_points}"
    for path in paths[: generator.choice((0, 1))]:
        call("run", path, "--executor", "serial")
        grow_old(store)
    process = start("run", paths[1], "--executor", "serial", "--workers", "1")
    wait_for(store, process, generator.uniform(0.0, seconds))
    try:
        os.killpg(process.pid, signal.SIGSTOP)
    except ProcessLookupError:
        campaign.count("ended before")
    grow_old(store)
    if generator.random() < 0.5:
        call("run", paths[2], "--executor", "serial")
        grow_old(store)
    code, output = call("gc", str(store), "--delete", "--grace", generator.choice(("0s", "10m")))
    campaign.count(f"gc {code}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    code, output = wait(process)
    campaign.count(f"run {code}")
    if is_unexpected(code, output):
        campaign.fail(f"{where}: {last_line(output)}")
    check_store(campaign, store, where=where)
    code, output = call("run", paths[1], "--executor", "serial")
    if code:
        campaign.fail(f"{where}: the run cannot go on: {last_line(output)}")
    check_store(campaign, store, where=f"{where}, continued")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign("gc races", Path(folder))
        recipe = make_models(campaign.folder / "models")
        for scale in SCALES:
            learn_truth(campaign, recipe, mask_scale=scale)
        generator = random.Random(options.seed)
        seconds = measure_run(campaign, recipe, "serial", mask_scale=SCALES[0])
        for _ in range(options.races):
            race(campaign, recipe, seconds, generator)
        return campaign.finish()


if __name__ == "__main__":
    sys.exit(main())
