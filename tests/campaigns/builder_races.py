"""Two builders of one recipe at the same time, also with two versions of pyarrow.

pip install --target /tmp/pyarrow --no-deps pyarrow==25.0.1
.venv/bin/python tests/campaigns/builder_races.py --races 50 --other-packages /tmp/pyarrow
"""

from __future__ import annotations

import random
import sys
import time

from campaign import (
    Campaign,
    check_store,
    last_line,
    learn_truth,
    make_parser,
    open_campaign,
    start,
    wait,
    write_recipe,
)


def race(
    campaign: Campaign, recipe: dict[str, object], other_packages: str, generator: random.Random
) -> None:
    """Let two builders build one recipe, one of them later by a moment."""
    store = campaign.begin_point()
    path = str(write_recipe(campaign, recipe, store))
    other = {"PYTHONPATH": other_packages} if other_packages else {}
    environments: list[dict[str, str]] = [{}, other]
    generator.shuffle(environments)
    processes = []
    for environment in environments:
        fresh = ["--fresh"] if generator.random() < 0.2 else []
        executor = generator.choice(("serial", "processes"))
        processes.append(
            start("run", path, "--executor", executor, *fresh, environment=environment)
        )
        time.sleep(generator.uniform(0.0, 0.3))
    for process in processes:
        code, output = wait(process)
        campaign.count(f"exit {code}")
        if code:
            campaign.fail(f"race {campaign.num_points}: a builder failed: {last_line(output)}")
    check_store(campaign, store, where=f"race {campaign.num_points}")


def main() -> int:
    parser = make_parser(__doc__, count="--races", default=50)
    parser.add_argument("--other-packages", default="")
    options = parser.parse_args()
    with open_campaign("builder races") as (campaign, recipe):
        learn_truth(campaign, recipe)
        generator = random.Random(options.seed)
        for _ in range(options.races):
            race(campaign, recipe, options.other_packages, generator)
        return campaign.finish()


if __name__ == "__main__":
    sys.exit(main())
