"""Kill and stop runs at random moments, go on, and compare the store with a clean build.

    .venv/bin/python tests/campaigns/kill_points.py --points 200 --executors serial,processes,ray

A killed run (SIGKILL to all of its processes) is started again. A stopped one (SIGSTOP) is held
while its lease grows stale and garbage is collected, and then goes on.
"""

from __future__ import annotations

import argparse
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


def try_point(
    campaign: Campaign,
    recipe: dict[str, object],
    executor: str,
    seconds: float,
    generator: random.Random,
) -> None:
    """Kill or stop one run at one moment; check the store before and after it goes on."""
    store = campaign.folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    campaign.meanings.clear()
    path = str(write_recipe(campaign, recipe, store))
    action = generator.choice(("kill", "stop"))
    moment = generator.uniform(0.0, seconds)
    where = f"{action} {executor} after {moment:.2f} s"
    process = start("run", path, "--executor", executor)
    wait_for(store, process, moment)
    campaign.num_points += 1
    try:
        os.killpg(process.pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    except ProcessLookupError:
        action = "ended before"
    if action == "stop":
        grow_old(store)
        code, output = call(
            "gc", str(store), "--delete", "--grace", generator.choice(("0s", "10m"))
        )
        campaign.count(f"gc {code}")
        os.killpg(process.pid, signal.SIGCONT)
    code, output = wait(process)
    campaign.count(f"{action} {executor} {code}")
    if action != "kill" and is_unexpected(code, output):
        campaign.fail(f"{where}: {last_line(output)}")
    check_store(campaign, store, where=where)
    code, output = call("run", path, "--executor", "serial")
    if code:
        campaign.fail(f"{where}: the run cannot go on: {last_line(output)}")
    check_store(campaign, store, where=f"{where}, continued")
    missing = [key for key in campaign.truth if not (store / key).exists()]
    if missing:
        campaign.fail(f"{where}, continued: {missing[0]} is missing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--executors", default="serial,processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign("kill points", Path(folder))
        recipe = make_models(campaign.folder / "models")
        learn_truth(campaign, recipe)
        generator = random.Random(options.seed)
        executors = options.executors.split(",")
        lengths = {executor: measure_run(campaign, recipe, executor) for executor in executors}
        for point in range(options.points):
            executor = executors[point % len(executors)]
            try_point(campaign, recipe, executor, lengths[executor], generator)
        return campaign.finish()


if __name__ == "__main__":
    sys.exit(main())
