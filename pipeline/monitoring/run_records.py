"""Runs as their store knows them: numbered records that tell who builds what, how far it is, and
whether it still lives.

`runs/NAME/000007.json` is created once, by the run that takes this number;
`runs/NAME/000007.status.json` is replaced every few seconds by that run alone. A run that only one
may do at a time (`--exclusive`) looks at the last number first: while its status changes, it lives;
where it has not changed for `EXPIRY_SECONDS`, it is dead, and the next number is taken. No two
clocks are compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import override

from mmerge.manifests.digest import parse_json, to_canonical_json
from mmerge.manifests.errors import AlreadyExists, ManifestError, MmergeError, NotFound, StoreError
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.workers.task import TaskResult

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
"""A run whose status has not changed for so long is dead."""
KEPT_RUNS = 50
"""Records of a name that are kept; older ones are deleted."""

EARLIER_PHASES = {"survey": "scan", "carry": "copy"}
"""Names of phases in the records of version 0.1."""

State = Literal["running", "finished", "failed", "interrupted"]


class PhaseStatus(BaseModel):
    """How far one phase is. `num_bytes` are bytes of input to read, `seconds` is summed over tasks,
    `wall_seconds` on the driver's clock.
    """

    model_config = ConfigDict(extra="ignore")

    num_tasks: int = 0
    num_done: int = 0
    num_reused: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0


class RunStatus(BaseModel):
    """What a run says of itself."""

    model_config = ConfigDict(extra="ignore")

    name: str
    number: int = Field(ge=1)
    state: State = "running"
    build: str | None = None
    """The digest of the build, known once the inputs are scanned."""
    host: str = ""
    pid: int = 0
    job: str | None = None
    """The submission id, where it is a Ray job."""
    started: str = ""
    updated: str = ""
    heartbeat: int = 0
    start_seconds: float = 0.0
    """From the beginning of the first phase with work to its first result, without the seconds of
    that task: workers starting.
    """
    wall_seconds: float = 0.0
    """Of the whole run, once it has ended."""
    phases: dict[str, PhaseStatus] = Field(default_factory=dict)
    failures: list[str] = Field(default_factory=list)
    message: str | None = None

    @field_validator("phases", mode="before")
    @classmethod
    def _rename_phases(cls, phases: Any) -> Any:
        """Accept the phase names of records that version 0.1 wrote."""
        if not isinstance(phases, dict):
            return phases
        return {EARLIER_PHASES.get(name, name): phase for name, phase in phases.items()}


class RunUnderWay(MmergeError):
    """Another run of the same composite lives."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status
        job = f", job {status.job}" if status.job else ""
        super().__init__(
            f"{status.name}: run {status.number} is under way on {status.host} since"
            f" {status.started}{job}"
        )


def list_runs(store: Store, name: str) -> list[int]:
    """Return the numbers of a composite's recorded runs, in ascending order."""
    matches = (
        re.fullmatch(rf"runs/{re.escape(name)}/(\d{{6,}})\.json", key)
        for key in store.list(f"runs/{name}")
    )
    return sorted(int(match[1]) for match in matches if match)


def list_run_names(store: Store) -> list[str]:
    """Return the names of all composites that runs were recorded of."""
    return sorted({key.split("/")[1] for key in store.list("runs") if key.count("/") == 2})


def read_status(store: Store, name: str, number: int) -> RunStatus:
    """Return the last status of one run. Raises NotFound, ManifestError when it is damaged."""
    try:
        raw = store.read(_status_key(name, number))
    except NotFound:
        raw = store.read(_claim_key(name, number))
    try:
        return RunStatus.model_validate(parse_json(raw, what=_status_key(name, number)))
    except (ValueError, ValidationError) as error:
        raise ManifestError(
            f"{store.uri}: {_status_key(name, number)} is damaged ({str(error).splitlines()[0]})"
        ) from error


def _claim_key(name: str, number: int) -> str:
    return f"runs/{name}/{number:06d}.json"


def _status_key(name: str, number: int) -> str:
    return f"runs/{name}/{number:06d}.status.json"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _job_id() -> str | None:
    """Return the submission id of the Ray job that this process drives, which Ray gives to it
    within a job's configuration.
    """
    try:
        job_id = (
            json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
            .get("metadata", {})
            .get("job_submission_id")
        )
    except (ValueError, AttributeError):
        return None
    return str(job_id) if job_id else None


def begin_run(
    store: Store, name: str, *, exclusive: bool, clock: Callable[[], float] = time.monotonic
) -> RunStatus:
    """Return the record of a new run, numbered after the last one.

    Args:
        store: where the composite is built.
        name: the composite's name.
        exclusive: take the number only if no earlier run lives; watches the last one for up to
            `EXPIRY_SECONDS` to know.
        clock: seconds, for tests.

    Raises:
        RunUnderWay: `exclusive`, and another run lives.
    """
    while True:
        numbers = list_runs(store, name)
        if exclusive and numbers:
            _await_death(store, name, numbers[-1], clock)
        number = (numbers[-1] if numbers else 0) + 1
        status = RunStatus(
            name=name,
            number=number,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=_job_id(),
            started=_now(),
            updated=_now(),
        )
        try:
            store.put_new(
                _claim_key(name, number),
                to_canonical_json(status.model_dump(mode="json", exclude_none=True)),
            )
        except AlreadyExists:
            continue  # another one was faster: look at it
        for old in numbers[: -KEPT_RUNS + 1]:
            store.delete(_status_key(name, old))
            store.delete(_claim_key(name, old))
        return status


def _await_death(store: Store, name: str, number: int, clock: Callable[[], float]) -> None:
    """Return when the run of that number is over or dead. Raises RunUnderWay as soon as it shows
    that it lives.
    """
    seen = read_status(store, name, number)
    end = clock() + EXPIRY_SECONDS
    while seen.state == "running" and clock() < end:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 4))
        now = read_status(store, name, number)
        if now.state == "running" and now.heartbeat != seen.heartbeat:
            raise RunUnderWay(now)
        if now.state != "running":
            return


class RunRecord(Progress):
    """Keeps the record of one run: use as a context manager around the run, and as its progress."""

    def __init__(self, store: Store, status: RunStatus) -> None:
        self.status = status
        self._store = store
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began: dict[str, float] = {}
        self._entered = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="mmerge-status", daemon=True)

    def __enter__(self) -> RunRecord:
        self._entered = time.monotonic()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.status.wall_seconds = time.monotonic() - self._entered
        if kind is None:
            self.status.state = "finished"
        else:
            self.status.state = "failed" if isinstance(value, Exception) else "interrupted"
            self.status.message = str(value) or None
        self._write()

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        with self._lock:
            self._began.setdefault(phase, time.monotonic())
            phase_status = self.status.phases.setdefault(phase, PhaseStatus())
            phase_status.num_tasks += num_tasks
            phase_status.num_reused += num_reused
            phase_status.num_bytes += num_bytes

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        with self._lock:
            phase_status = self.status.phases[phase]
            phase_status.num_done += 1
            phase_status.bytes_read += result.num_bytes
            phase_status.bytes_written += (
                0 if result.reused or result.entry is None else result.entry.object.num_bytes
            )
            phase_status.seconds += result.seconds
            phase_status.wall_seconds = time.monotonic() - self._began[phase]
            if not self.status.start_seconds:
                self.status.start_seconds = max(phase_status.wall_seconds - result.seconds, 1e-6)

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        with self._lock:
            self.status.phases[phase].num_failed += 1
            self.status.failures.append(f"{phase} {shard}: {error}")

    @override
    def name_build(self, build: str) -> None:
        with self._lock:
            self.status.build = build

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self.status.heartbeat += 1
            self.status.updated = _now()
            data: Any = self.status.model_dump(mode="json", exclude_none=True)
        try:
            self._store.put(
                _status_key(self.status.name, self.status.number), to_canonical_json(data)
            )
        except StoreError:
            # The run itself will say what is wrong with the store; a missed beat is no reason to
            # end it
            return
