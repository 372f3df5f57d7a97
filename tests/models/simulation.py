"""A seeded simulation of drivers, leases, references, collections and a store on one clock.

Each episode is a store of its own, with a seed of its own: processes start, run for some store
calls, are suspended and killed, time passes, and calls fail. Equal seeds give equal episodes, call
by call. One episode again, with every fault that it finds:

    PYTHONPATH=tests .venv/bin/python -m models.simulation SEED
"""

from __future__ import annotations

import random
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from models.audit import Audit
from models.clockwork import Killed, Process, Stuck
from models.replay import ReplayedModels
from models.simulated_bucket import make_object_store
from models.simulated_store import World
from models.store_life import MINUTE, NAMES, read_whole
from models.tiny_builds import WEIGHTS, TinyModels, simulated_world

from mmerge.manifests.errors import MmergeError
from mmerge.manifests.maintenance.delete_build import delete_build
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.open import open_store

STEPS_PER_EPISODE = 4000
MOST_PROCESSES = 4
FAULT_SHARE = 0.004
FAULTS = ("before", "lost", "twice", "conflict")
LIES = ("swallow", "short", "flip")
LIE_SHARE = 0.03
"""Of the writes of new objects to a bucket."""
CREATE_FAULT_SHARE = 0.03
"""Of the creates in a bucket, except those of probes: the protocol rests on them."""
DAY = 24 * 60 * MINUTE
JUMPS = (20.0, 90.0, 14 * MINUTE, 16 * MINUTE, 60 * MINUTE, 60 * MINUTE, DAY + 60 * MINUTE)
PROMPT_CALLS = {"delete": 10 * MINUTE, "put_new": DAY}
"""How soon after the check before it a call reaches the store (docs/storage.md), by its verb."""
GRACES = (0.0, 10 * MINUTE, 30 * MINUTE)
MOST_CALLS = 200_000


class Fault(AssertionError):
    """An episode broke an invariant; the message has the command that repeats it."""


class Episode:
    """One store from its creation to `steps` store calls."""

    def __init__(self, models: ReplayedModels, seed: int, *, steps: int) -> None:
        self.models, self.seed, self.steps = models, seed, steps
        self.random = random.Random(seed)
        self.world = World(f"episode-{seed}", is_remote=self.random.random() < 0.5)
        self.world.choose_fault = self._choose_fault
        if self.world.is_remote:
            self.world.make_store = make_object_store
        self.audit = Audit(true_objects=models.models.truth.objects)
        self.audit.watch(self.world)
        self.live: list[Process] = []
        self.outcomes: dict[str, int] = {}

    def run(self) -> str:
        """Run the episode; return the digest of its trace. Raises Fault."""
        while self.world.num_steps < self.steps:
            self._act()
            if self.audit.faults:
                self._fail(self.audit.faults[0])
        for process in self.live:
            process.kill()
        for name, number in sorted(self.audit.references):
            for damage in self.audit.damages(self.world, self.audit.meanings[name, number])[:1]:
                self._fail(f"{name}@{number} is left with a damaged build: {damage}")
        return self.world.trace()

    def _fail(self, fault: str) -> None:
        for process in self.live:
            process.kill()
        raise Fault(
            f"seed {self.seed}, step {self.world.num_steps}: {fault}. Again:"
            f" PYTHONPATH=tests .venv/bin/python -m models.simulation {self.seed}"
        )

    def _act(self) -> None:
        draw = self.random.random()
        if len(self.live) < MOST_PROCESSES and (draw < 0.15 or not self.live):
            self._start()
        elif draw < 0.90:
            self._advance(self.random.choice(self.live))
        elif draw < 0.93:
            self.random.choice(self.live).is_suspended = True
        elif draw < 0.95:
            process = self.random.choice(self.live)
            process.kill()
            self.live.remove(process)
        elif draw < 0.98:
            self._pass_time(self.random.choice(JUMPS))
        else:
            self._overtake(self.random.choice(self.live))

    def _overtake(self, process: Process) -> None:
        """Hold one process for so long that its leases expire, while others do whole operations."""
        process.is_suspended = True
        for _ in range(self.random.choice((1, 1, 2, 3, 4))):
            self._pass_time(self.random.choice((16 * MINUTE, 16 * MINUTE, DAY + 60 * MINUTE)))
            self._start(calls=MOST_CALLS)
        if process in self.live:
            self._advance(process)

    def _pass_time(self, seconds: float) -> None:
        """Move the clock; calls that follow at once upon a check are made before."""
        for process in list(self.live):
            if seconds > PROMPT_CALLS.get(process.pending_verb, float("inf")):
                process.finish_call()
                if process.is_done:
                    self.live.remove(process)
                    self._end(process)
        self.world.clock.advance_to(self.world.clock.seconds + seconds)

    def _start(self, calls: int | None = None) -> None:
        draw = self.random.random()
        if draw < 0.55:
            process = self._start_run()
        elif draw < 0.82:
            process = self._start_collection()
        elif draw < 0.86:
            process = self._start_deletion()
        else:
            process = self._start_reader(draw < 0.93)
        self.live.append(process)
        self._advance(process, calls)

    def _start_run(self) -> Process:
        name, weight = self.random.choice(NAMES), self.random.choice(WEIGHTS)
        fresh, exclusive = self.random.random() < 0.1, self.random.random() < 0.3
        return self.world.start(
            "run",
            lambda: self.models.run(
                self.world, name=name, weight=weight, fresh=fresh, exclusive=exclusive
            ),
            reference=name,
            table=self.random.choice(("zstd", "zstd", "snappy")),
            on_report=lambda process, report: self.audit.check_success(
                self.world, process, report.build, report.reference.number
            ),
        )

    def _start_collection(self) -> Process:
        store, grace = open_store(self.world.uri), self.random.choice(GRACES)
        return self.world.start(
            "gc",
            lambda: collect_garbage(store, grace=timedelta(seconds=grace), delete=True),
            grace=grace,
        )

    def _start_deletion(self) -> Process:
        store, name = open_store(self.world.uri), self.random.choice(NAMES)
        objects = self.random.random() < 0.5
        return self.world.start(
            "delete",
            lambda: delete_build(store, name, objects=objects, delete=True),
            deletes=True,
        )

    def _start_reader(self, whole: bool) -> Process:
        uri = f"{self.world.uri}#{self.random.choice(NAMES)}"
        return self.world.start("reader", lambda: read_whole(uri) if whole else verify(uri))

    def _advance(self, process: Process, calls: int | None = None) -> None:
        """Run a process for some calls; with a number of calls, through its sleeps."""
        process.is_suspended = False
        if calls is None:
            process.advance(self.random.choice((1, 1, 2, 3, 5, 8, 20, 60)))
        else:
            while not process.is_done and process.num_calls < calls:
                process.advance(calls - process.num_calls)
        if process.num_calls > MOST_CALLS:
            raise Stuck(f"seed {self.seed}: {process.name} makes store calls without end")
        if process.is_done:
            self.live.remove(process)
            self._end(process)

    def _end(self, process: Process) -> None:
        error = process.error
        outcome = f"{process.name} {type(error).__name__ if error else 'done'}"
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if not isinstance(error, (MmergeError, Killed, type(None))):
            raise Fault(f"seed {self.seed}: {process.name} failed") from error

    def _choose_fault(self, process: Process, verb: str, key: str) -> str | None:
        draw = self.random.random()
        is_probe = "/create-" in key
        is_create = verb == "put_new" and self.world.is_remote and not is_probe
        share = CREATE_FAULT_SHARE if is_create else FAULT_SHARE
        if draw < share:
            return self.random.choice(FAULTS)
        # Only a server lies. What exists it would damage, until the writer has repaired it. One
        # that loses what it was to create is rightly taken for one whose create is not atomic.
        may_lie = self.world.is_remote and not is_probe and key not in self.world.objects
        if may_lie and verb in ("put", "put_new") and draw < share + LIE_SHARE:
            return self.random.choice(LIES)
        return None


def simulate(
    models: ReplayedModels, *, first_seed: int, steps: int
) -> tuple[int, int, dict[str, int]]:
    """Run episodes until `steps` store calls were made.

    Returns:
        Store calls, episodes, and how often each kind of process ended how.
    """
    num_steps = num_episodes = 0
    outcomes: dict[str, int] = {}
    while num_steps < steps:
        episode = Episode(models, first_seed + num_episodes, steps=STEPS_PER_EPISODE)
        episode.run()
        num_steps += episode.world.num_steps
        num_episodes += 1
        for outcome, count in episode.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    return num_steps, num_episodes, outcomes


def make_models(folder: Path) -> ReplayedModels:
    """Return tiny models with their truth, whose tasks are replayed."""
    models = TinyModels(folder)
    models.learn_truth()
    return ReplayedModels(models)


def main() -> int:
    """Repeat the episode of one seed; print what went wrong."""
    with tempfile.TemporaryDirectory() as folder, simulated_world():
        episode = Episode(make_models(Path(folder)), int(sys.argv[1]), steps=STEPS_PER_EPISODE)
        try:
            trace = episode.run()
        except Fault as fault:
            print(fault)  # noqa: T201
            return 1
    print(f"{episode.world.num_steps} steps, no fault, trace {trace}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
