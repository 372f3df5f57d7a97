"""Kill and stop runs at random moments, go on, and compare the store with a clean build.

    .venv/bin/python tests/campaigns/kill_points.py --points 200 --executors serial,processes,ray

A killed run (SIGKILL to all of its processes) is started again. A stopped one (SIGSTOP) is held
while its lease grows stale and garbage is collected, and then goes on.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from contextlib import suppress

from campaign import (
    Campaign,
    check_continued,
    collect,
    grow_old,
    is_unexpected,
    last_line,
    learn_truth,
    let_go_on,
    make_parser,
    measure_run,
    open_campaign,
    start,
    stop,
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
    store = campaign.begin_point()
    path = str(write_recipe(campaign, recipe, store))
    action = generator.choice(("kill", "stop"))
    moment = generator.uniform(0.0, seconds)
    where = f"{action} {executor} after {moment:.2f} s"
    process = start("run", path, "--executor", executor)
    wait_for(store, process, moment)
    if action == "kill":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif stop(process):
        grow_old(store)
        collect(campaign, store, generator)
        let_go_on(process)
    else:
        action = "ended before"
    code, output = wait(process)
    campaign.count(f"{action} {executor} {code}")
    if action != "kill" and is_unexpected(code, output):
        campaign.fail(f"{where}: {last_line(output)}")
    check_continued(campaign, store, path, where=where)
    missing = [key for key in campaign.truth if not (store / key).exists()]
    if missing:
        campaign.fail(f"{where}, continued: {missing[0]} is missing")


def main() -> int:
    parser = make_parser(__doc__, count="--points", default=200)
    parser.add_argument("--executors", default="serial,processes")
    options = parser.parse_args()
    with open_campaign("kill points") as (campaign, recipe):
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
