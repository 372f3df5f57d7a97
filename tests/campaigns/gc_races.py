"""Runs that are suspended until their lease is stale, against garbage collection.

    .venv/bin/python tests/campaigns/gc_races.py --races 50

The store has older builds whose objects the suspended run reuses, and another run that moves the
name on while it is held.
"""

from __future__ import annotations

import random
import sys

from campaign import (
    Campaign,
    call,
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

SCALES = (0.5, 0.75, 1.0)
"""Values of `mask_scale`: builds of them share the base and the copied encoders."""


def race(
    campaign: Campaign, recipe: dict[str, object], seconds: float, generator: random.Random
) -> None:
    """Suspend one run at one moment, let others work, and let it go on."""
    store = campaign.begin_point()
    paths = [str(write_recipe(campaign, recipe, store, mask_scale=scale)) for scale in SCALES]
    generator.shuffle(paths)
    where = f"race {campaign.num_points}"
    for path in paths[: generator.choice((0, 1))]:
        call("run", path, "--executor", "serial")
        grow_old(store)
    process = start("run", paths[1], "--executor", "serial", "--workers", "1")
    wait_for(store, process, generator.uniform(0.0, seconds))
    if not stop(process):
        campaign.count("ended before")
    grow_old(store)
    if generator.random() < 0.5:
        call("run", paths[2], "--executor", "serial")
        grow_old(store)
    collect(campaign, store, generator)
    let_go_on(process)
    code, output = wait(process)
    campaign.count(f"run {code}")
    if is_unexpected(code, output):
        campaign.fail(f"{where}: {last_line(output)}")
    check_continued(campaign, store, paths[1], where=where)


def main() -> int:
    options = make_parser(__doc__, count="--races", default=50).parse_args()
    with open_campaign("gc races") as (campaign, recipe):
        for scale in SCALES:
            learn_truth(campaign, recipe, mask_scale=scale)
        generator = random.Random(options.seed)
        seconds = measure_run(campaign, recipe, "serial", mask_scale=SCALES[0])
        for _ in range(options.races):
            race(campaign, recipe, seconds, generator)
        return campaign.finish()


if __name__ == "__main__":
    sys.exit(main())
