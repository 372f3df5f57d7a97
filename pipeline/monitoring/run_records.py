"""Numbered run records in the store: builder, progress and heartbeat of every run.

`runs/NAME/000007.json` is created once, by the run that gets this number;
`runs/NAME/000007.status.json` is replaced every few seconds by that run alone. An exclusive run
(`--exclusive`) first watches the record with the highest number. If its heartbeat changes, that run
is alive. If it does not change for `EXPIRY_SECONDS`, that run is dead and the new run takes the
next number. Clocks of different hosts are never compared.
"""

from __future__ import annotations

import json
import os
import re
import secrets
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
from mmerge.manifests.errors import ManifestError, MmergeError, NotFound, StoreError, first_line
from mmerge.manifests.stores import confirm
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.workers.task import TaskResult

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
"""A run whose status has not changed for this time counts as dead."""
KEPT_RUNS = 50
"""Number of records kept per name; older ones are deleted."""

EARLIER_PHASES = {"survey": "scan", "carry": "copy"}
"""Names of phases in the records of version 0.1."""

State = Literal["running", "finished", "failed", "interrupted"]


class PhaseStatus(BaseModel):
    """Progress of one phase.

    `num_bytes` are bytes of input to read; `seconds` is the sum over tasks, `wall_seconds` the time
    on the driver's clock.
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
    """Status of one run, as its record stores it."""

    model_config = ConfigDict(extra="ignore")

    name: str
    number: int = Field(ge=1)
    state: State = "running"
    build: str | None = None
    """Digest of the build; None until the inputs are scanned."""
    host: str = ""
    pid: int = 0
    run_id: str = ""
    """Random, so that a run recognises its own record after the answer to its request was lost."""
    job: str | None = None
    """Submission id if the run is a Ray job."""
    started: str = ""
    updated: str = ""
    heartbeat: int = 0
    start_seconds: float = 0.0
    """Start-up time of the workers.

    Measured from the start of the first phase with work to its first result, minus that task.
    """
    wall_seconds: float = 0.0
    """Duration of the whole run; 0 until it has ended."""
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
    """Another run of the same composite is alive."""

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
        re.fullmatch(rf"runs/{re.escape(name)}/([0-9]{{6,18}})\.json", key)
        for key in store.list(f"runs/{name}")
    )
    return sorted(int(match[1]) for match in matches if match)


def list_run_names(store: Store) -> list[str]:
    """Return the names of all composites with recorded runs."""
    return sorted({key.split("/")[1] for key in store.list("runs") if key.count("/") == 2})


def read_status(store: Store, name: str, number: int) -> RunStatus:
    """Return the last status of one run. Raises NotFound, ManifestError when it is damaged."""
    try:
        raw = store.read(_status_key(name, number))
    except NotFound:
        raw = store.read(_record_key(name, number))
    try:
        return RunStatus.model_validate(parse_json(raw, what=_status_key(name, number)))
    except (ValueError, ValidationError) as error:
        raise ManifestError(
            f"{store.uri}: {_status_key(name, number)} is damaged ({first_line(error)})."
            " 'mmerge run RECIPE' (without --exclusive) begins a new record"
        ) from error


def _record_key(name: str, number: int) -> str:
    return f"runs/{name}/{number:06d}.json"


def _status_key(name: str, number: int) -> str:
    return f"runs/{name}/{number:06d}.status.json"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _job_id() -> str | None:
    """Return the submission id of the Ray job whose driver is this process, None if it is none.

    Ray passes it in the job's configuration.
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
    """Create the record of a new run, with the next number, and return it.

    Args:
        store: where the composite is built.
        name: the composite's name.
        exclusive: create the record only if no earlier run is alive; watches the last one for up
            to `EXPIRY_SECONDS`.
        clock: returns seconds; replaced in tests.

    Raises:
        RunUnderWay: `exclusive` is set and another run is alive.
        StoreUnavailable: the store loses or changes what it is sent.
    """
    run_id = secrets.token_hex(8)
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
            run_id=run_id,
            job=_job_id(),
            started=_now(),
            updated=_now(),
        )
        data = to_canonical_json(status.model_dump(mode="json", exclude_none=True))
        if confirm.create(store, _record_key(name, number), data).data != data:
            continue  # another run took this number: check that run
        for old in numbers[: -KEPT_RUNS + 1]:
            store.delete(_status_key(name, old))
            store.delete(_record_key(name, old))
        return status


def _await_death(store: Store, name: str, number: int, clock: Callable[[], float]) -> None:
    """Wait until a run has ended or counts as dead.

    Raises:
        RunUnderWay: the run's heartbeat has changed.
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
    """Updates the record of one run: context manager around the run, and its progress object."""

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
            # A missed heartbeat does not end the run: its own writes report a broken store.
            return
