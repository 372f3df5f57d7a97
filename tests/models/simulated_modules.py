"""Time, threads, random names and thread pools of product modules, replaced by simulated ones.

Product modules name what they use (`time`, `threading`, `secrets`, `ThreadPoolExecutor`, …); each
such name is replaced in every module of the protocol, so that the code itself needs no switch for
tests. Outside a process of the simulation the real things are used.
"""

from __future__ import annotations

import importlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as RealPool
from contextlib import ExitStack, contextmanager
from datetime import datetime, tzinfo
from types import ModuleType
from typing import Any
from unittest import mock

from models.clockwork import EPOCH, Process, current_process

import mmerge.manifests.maintenance.lease as lease_module
from mmerge.manifests.maintenance.lease import Timing

MODULES = (
    "manifests.maintenance.lease",
    "manifests.maintenance.garbage_collection",
    "manifests.maintenance.copy_build",
    "manifests.maintenance.verify",
    "manifests.maintenance.check_build",
    "manifests.maintenance.delete_build",
    "manifests.maintenance.deletion",
    "manifests.maintenance.fenced_commit",
    "manifests.format.publish",
    "manifests.format.references",
    "manifests.format.manifest",
    "manifests.stores.confirm",
    "manifests.stores.create_check",
    "manifests.stores.writer",
    "manifests.stores.object_store",
    "pipeline.build.commit",
    "pipeline.build.run",
    "pipeline.monitoring.run_records",
    "workers.tasks.run",
    "workers.tasks.heartbeat",
)
"""Modules of the protocol; those that do not exist are skipped."""


class SimulatedTime:
    """`time`, by the simulated clock."""

    @staticmethod
    def monotonic() -> float:
        process = current_process()
        return process.clock.seconds if process else time.monotonic()

    @staticmethod
    def time() -> float:
        process = current_process()
        return EPOCH.timestamp() + process.clock.seconds if process else time.time()

    @staticmethod
    def sleep(seconds: float) -> None:
        process = current_process()
        if process:
            process.sleep(seconds)
        else:
            time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class SimulatedDatetime(datetime):
    """`datetime`, by the simulated clock and the error of the process's own clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        process = current_process()
        return process.clock.now() if process else datetime.now(tz)


class SimulatedEvent:
    """`threading.Event`, waiting in simulated time."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._waiters: list[Process] = []

    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def wait(self, timeout: float | None = None) -> bool:
        process = current_process()
        if process is None or timeout is None:
            return self._event.wait(timeout)
        if not self._event.is_set() and not process.is_killed:
            process.sleep(timeout)
        return self._event.is_set() or process.is_killed


class SimulatedThread:
    """`threading.Thread`: a background thread of the process, which runs when its time comes."""

    def __init__(
        self,
        target: Callable[..., Any],
        name: str = "thread",
        daemon: bool = False,
        args: tuple[Any, ...] = (),
    ) -> None:
        self.name, self.daemon = name, daemon
        parent = current_process()
        self._real: threading.Thread | None = None
        self.ident: int | None = None
        self._process: Process | None = None
        if parent is None:
            self._real = threading.Thread(target=target, name=name, daemon=daemon, args=args)
            return
        self._process = Process(
            parent.clock,
            f"{parent.name}/{name}",
            lambda: target(*args),
            parent=parent,
            number=parent.number * 100 + len(parent.children) + 1,
        )
        parent.children.append(self._process)

    def start(self) -> None:
        self.ident = 1
        if self._real is not None:
            self._real.start()
        elif self._process is not None:
            self._process.advance(1 << 60)

    def join(self, timeout: float | None = None) -> None:
        if self._real is not None:
            self._real.join(timeout)
        elif self._process is not None and not self._process.is_done:
            if self._process.is_sleeping:
                self._process.wakes = self._process.clock.seconds
            self._process.advance(1 << 60)

    def is_alive(self) -> bool:
        if self._real is not None:
            return self._real.is_alive()
        return self._process is not None and not self._process.is_done


class SimulatedThreading:
    """`threading`, with simulated threads and events."""

    Thread, Event = SimulatedThread, SimulatedEvent

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class SimulatedSecrets:
    """`secrets`: names in the order in which they were asked for."""

    @staticmethod
    def token_hex(num_bytes: int = 16) -> str:
        process = current_process()
        if process is None:
            return secrets.token_hex(num_bytes)
        process.settings["names"] = process.settings.get("names", 0) + 1
        text = f"{process.number:06x}{process.settings['names']:06x}"
        return text.rjust(2 * num_bytes, "0")[-2 * num_bytes :]

    def __getattr__(self, name: str) -> Any:
        return getattr(secrets, name)


class SimulatedRandom:
    """`random`: the middle of every interval."""

    @staticmethod
    def uniform(low: float, high: float) -> float:
        return (low + high) / 2

    def __getattr__(self, name: str) -> Any:
        return getattr(random, name)


class InlinePool:
    """`ThreadPoolExecutor` of one thread, which is the caller's."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        if current_process() is None:
            return RealPool(*args, **options)
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> Iterator[Any]:
        return iter([function(*items) for items in zip(*iterables, strict=False)])

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:  # noqa: BLE001
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


REPLACEMENTS: dict[str, Any] = {
    "time": SimulatedTime(),
    "datetime": SimulatedDatetime,
    "threading": SimulatedThreading(),
    "secrets": SimulatedSecrets(),
    "random": SimulatedRandom(),
    "ThreadPoolExecutor": InlinePool,
}


def simulated_timing() -> Timing:
    """Return the timing of a lease, by the simulated clock."""
    return Timing(
        now=SimulatedTime.monotonic,
        sleep=SimulatedTime.sleep,
        make_id=lambda: SimulatedSecrets.token_hex(8),
    )


DEFAULTS = {time.sleep: SimulatedTime.sleep, time.monotonic: SimulatedTime.monotonic}


def _keyword_defaults(module: ModuleType) -> Iterator[dict[str, Any]]:
    """Yield the defaults of keyword arguments of every function and method of a module."""
    for value in vars(module).values():
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            defaults = getattr(member, "__kwdefaults__", None)
            if defaults and getattr(member, "__module__", "") == module.__name__:
                yield defaults


def _simulated_defaults(defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: replacement
        for name, value in defaults.items()
        for real, replacement in DEFAULTS.items()
        if value is real
    }


@contextmanager
def simulated_modules() -> Iterator[None]:
    """Replace time, threads and random names in all modules of the protocol."""
    with ExitStack() as stack:
        for name in MODULES:
            try:
                module = importlib.import_module(f"mmerge.{name}")
            except ModuleNotFoundError:
                continue
            for attribute, replacement in REPLACEMENTS.items():
                if hasattr(module, attribute):
                    stack.enter_context(mock.patch.object(module, attribute, replacement))
            for defaults in _keyword_defaults(module):
                stack.enter_context(mock.patch.dict(defaults, _simulated_defaults(defaults)))
        stack.enter_context(mock.patch.object(lease_module, "Timing", simulated_timing))
        yield
