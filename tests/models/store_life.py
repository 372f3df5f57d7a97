"""A Hypothesis state machine over the whole life of a store.

Processes are started, held between any two of their store calls, continued, suspended, killed; the
clock jumps; inputs change; the store fails, lies and loses answers. `Audit` watches every effect.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from models.audit import Audit
from models.clockwork import Clock, Killed, Process, Stuck
from models.simulated_bucket import make_object_store
from models.simulated_store import World
from models.tiny_builds import WEIGHTS, TinyModels

from mmerge.manifests.errors import MmergeError
from mmerge.manifests.format.manifest import read_manifest
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import read_table
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.maintenance.delete_build import delete_build
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.create_check import verdict_key
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.run import RunReport

MINUTE, HOUR = 60.0, 3600.0
NAMES = ("omni", "solo")
FAULTS = ("before", "lost", "twice", "conflict")
LIES = ("swallow", "short", "flip")
MOST_CALLS = 20_000
"""No operation on these tiny stores makes as many store calls, sleeping included."""
calls_to_run = st.one_of(st.just(MOST_CALLS), st.integers(0, 12), st.integers(0, 160))
faults_of_run = st.dictionaries(st.integers(0, 160), st.sampled_from(FAULTS), max_size=3)
lies_of_run = st.dictionaries(st.integers(0, 160), st.sampled_from(LIES), max_size=1)


class StoreLife(RuleBasedStateMachine):
    """Two stores, of which the second one is copied into."""

    models: ClassVar[TinyModels]
    kind: ClassVar[str] = "memory"
    make_medium: ClassVar[Callable[[], Any]] = staticmethod(lambda: None)
    num_machines = 0

    def __init__(self) -> None:
        super().__init__()
        StoreLife.num_machines += 1
        self.clock = Clock()
        self.processes: list[Process] = []
        self.world, self.audit = self._make_world("main")
        self.target, self.target_audit = self._make_world("target")
        self.models.set_version(0)

    def _make_world(self, name: str) -> tuple[World, Audit]:
        world = World(
            f"{name}-{self.kind}-{StoreLife.num_machines}",
            is_remote=self.kind == "s3",
            clock=self.clock,
            medium=self.make_medium(),
        )
        world.choose_fault = _scripted_fault
        if self.kind == "s3":
            world.make_store = make_object_store
            store = open_store(world.uri)
            store.put(verdict_key(store), b'{"atomic_create":true}')
        audit = Audit(true_objects=self.models.truth.objects)
        audit.watch(world)
        return world, audit

    def _start(
        self, name: str, function: Callable[[], Any], calls: int, **settings: Any
    ) -> Process:
        process = self.world.start(name, function, **settings)
        process.number = len(self.processes) + 1
        process.name = f"{name} {process.number}"
        self.processes.append(process)
        self._continue(process, calls)
        return process

    def _continue(self, process: Process, calls: int) -> None:
        process.is_suspended = False
        stop = process.num_calls + calls
        while not process.is_done and process.num_calls < stop:
            if process.num_calls >= MOST_CALLS:
                raise Stuck(f"{process.name} makes store calls without end")
            process.advance(min(1000, stop - process.num_calls))
            if process.is_sleeping and calls < MOST_CALLS:
                break
            if process.is_sleeping and process.wakes - process.settings["began"] > 24 * HOUR:
                raise Stuck(f"{process.name} waits for ever")
        if process.is_done and not process.settings.get("ended"):
            process.settings["ended"] = True
            self._end(process)

    def _pass_time(self, seconds: float) -> None:
        """Move the clock; deletes, which follow at once upon a check, are made before."""
        for process in self._live():
            if process.pending_verb == "delete" and seconds > 10 * MINUTE:
                process.finish_call()
        self.clock.advance_to(self.clock.seconds + seconds)

    def _end(self, process: Process) -> None:
        if not isinstance(process.error, (MmergeError, Killed, type(None))):
            raise AssertionError(f"{process.name} failed") from process.error
        note(f"{process.name}: {process.error or 'done'}")
        if process.error is None and "on_success" in process.settings:
            process.settings["on_success"](process)

    def _live(self) -> list[Process]:
        return [process for process in self.processes if not process.is_done]

    @rule(
        weight=st.sampled_from(WEIGHTS),
        name=st.sampled_from(NAMES),
        fresh=st.sampled_from([False, False, True]),
        records=st.booleans(),
        table=st.sampled_from(["zstd", "zstd", "snappy"]),
        calls=calls_to_run,
        faults=faults_of_run,
        lies=lies_of_run,
    )
    def build(
        self,
        weight: float,
        name: str,
        fresh: bool,
        records: bool,
        table: str,
        calls: int,
        faults: dict[int, str],
        lies: dict[int, str],
    ) -> None:
        def succeed(process: Process, report: RunReport) -> None:
            self.audit.check_success(self.world, process, report.build, report.reference.number)

        self._start(
            "run",
            lambda: self.models.run(
                self.world, name=name, weight=weight, fresh=fresh, records=records
            ),
            calls,
            table=table,
            # Only a server answers that it stored what it did not store.
            faults={**faults, **(lies if self.kind == "s3" else {})},
            reference=name,
            on_report=succeed,
            began=self.clock.seconds,
        )

    @rule(grace=st.sampled_from([0.0, 10 * MINUTE, HOUR]), calls=calls_to_run, faults=faults_of_run)
    def collect(self, grace: float, calls: int, faults: dict[int, str]) -> None:
        store = open_store(self.world.uri)
        self._start(
            "gc",
            lambda: collect_garbage(store, grace=timedelta(seconds=grace), delete=True),
            calls,
            grace=grace,
            faults=faults,
            began=self.clock.seconds,
        )

    @rule(name=st.sampled_from(NAMES), objects=st.booleans(), calls=calls_to_run)
    def delete(self, name: str, objects: bool, calls: int) -> None:
        store = open_store(self.world.uri)
        self._start(
            "delete",
            lambda: delete_build(store, name, objects=objects, delete=True),
            calls,
            deletes=True,
            began=self.clock.seconds,
        )

    @rule(data=st.data(), others=st.integers(0, 3))
    @precondition(lambda self: self._live())
    def overtake(self, data: st.DataObject, others: int) -> None:
        """Suspend one process until its leases are stale and garbage is collected; continue it."""
        process = data.draw(st.sampled_from(self._live()))
        for number in range(others + 1):
            process.is_suspended = True
            self._pass_time(16 * MINUTE)
            if number < others:
                weight, name = WEIGHTS[number % 2], NAMES[number // 2]
                self.build(weight, name, False, False, "zstd", MOST_CALLS, {}, {})
            else:
                self.collect(0.0, MOST_CALLS, {})
        self._continue(process, MOST_CALLS)

    @rule(name=st.sampled_from(NAMES), everything=st.booleans(), calls=calls_to_run)
    def copy(self, name: str, everything: bool, calls: int) -> None:
        def succeed(process: Process) -> None:
            report = process.result
            self.target_audit.check_success(
                self.target, process, report.build, report.reference.number
            )

        self._start(
            "copy",
            lambda: copy_build(f"{self.world.uri}#{name}", self.target.uri, everything=everything),
            calls,
            reference=name,
            on_success=succeed,
            began=self.clock.seconds,
        )

    @rule(data=st.data(), calls=calls_to_run)
    @precondition(lambda self: self._live())
    def proceed(self, data: st.DataObject, calls: int) -> None:
        self._continue(data.draw(st.sampled_from(self._live())), calls)

    @rule(data=st.data())
    @precondition(lambda self: self._live())
    def suspend(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._live())).is_suspended = True

    @rule(data=st.data())
    @precondition(lambda self: self._live())
    def kill(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._live())).kill()

    @rule(seconds=st.sampled_from([30.0, 14 * MINUTE, 16 * MINUTE, 2 * HOUR]))
    def wait(self, seconds: float) -> None:
        self._pass_time(seconds)

    @rule()
    def change_input(self) -> None:
        self.models.set_version(1 - self.models.version)

    @rule(weight=st.sampled_from(WEIGHTS), calls=st.integers(5, 80))
    def change_input_within_a_build(self, weight: float, calls: int) -> None:
        self.build(weight, "omni", False, False, "zstd", calls, {}, {})
        self.change_input()
        self._continue(self.processes[-1], MOST_CALLS)

    @rule(data=st.data(), in_target=st.booleans())
    def damage(self, data: st.DataObject, in_target: bool) -> None:
        """Change one bit of anything that a build needs."""
        world, audit = (self.target, self.target_audit) if in_target else (self.world, self.audit)
        keys = sorted(set().union(*audit.needs.values()) & world.objects.keys())
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        whole = world.objects[key].data
        position = data.draw(st.integers(0, len(whole) - 1))
        bit = data.draw(st.integers(0, 7))
        changed = bytearray(whole)
        changed[position] ^= 1 << bit
        world.store(key, bytes(changed), replace=True, lie="flip")
        world.damaged.add(key)

    @rule(in_target=st.booleans())
    def read_and_verify(self, in_target: bool) -> None:
        """Every existing build is read whole, and `verify` finds exactly the damaged ones."""
        world, audit = (self.target, self.target_audit) if in_target else (self.world, self.audit)
        for (name, number), _ in sorted(audit.references.items()):
            build = audit.meanings[name, number]
            if build not in audit.needs and self._live():
                continue  # a collection or a deletion is at work
            damages = audit.damages(world, build)
            uri = f"{world.uri}#{name}@{number}"
            reader = world.start("reader", lambda uri=uri: read_whole(uri)).run_to_end()
            checker = world.start("verify", lambda uri=uri: verify(uri)).run_to_end()
            problem = checker.error or checker.result.damages
            assert bool(problem) == bool(damages), (uri, problem, damages)
            if reader.error is None and not damages:
                assert reader.result == build

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert not self.audit.faults, self.audit.faults
        assert not self.target_audit.faults, self.target_audit.faults

    def teardown(self) -> None:
        for process in self._live():
            process.kill()


def read_whole(uri: str) -> str:
    """Return the build that a URI names, after every tensor of it was read."""
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    for row in read_table(store, manifest.table):
        store.read_range(row.object, offset=row.offset, num_bytes=row.num_bytes)
    return build


def _scripted_fault(process: Process, verb: str, key: str) -> str | None:
    """Return the fault that the process's script has for its current call."""
    faults = process.settings.get("faults", {})
    fault = faults.get(process.num_calls)
    if fault in LIES and (verb not in ("put", "put_new") or "/create-" in key):
        # A lie waits for the next write. A store that loses what it was to create is rightly taken
        # for one whose create is not atomic.
        faults[process.num_calls + 1] = faults.pop(process.num_calls)
        return None
    return str(fault) if fault else None
