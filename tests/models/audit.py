"""The small model that a simulated store is held against: names, builds, bytes, and what may go.

It sees every effect when it happens, parses what is stored with code of its own, and collects
faults; the project's readers take no part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from models.clockwork import Process
from models.simulated_store import World
from models.tiny_builds import digest, needed_keys

from mmerge.manifests.maintenance.lease import STALE


@dataclass
class Audit:
    """What is known of one store, and what went wrong in it."""

    true_objects: dict[str, bytes] = field(default_factory=dict)
    """The only bytes that a key `objects/…` may have; none for stores of made-up objects."""
    faults: list[str] = field(default_factory=list)
    meanings: dict[tuple[str, int], str] = field(default_factory=dict)
    """Reference numbers and their builds, whether they still exist or not."""
    references: dict[tuple[str, int], float] = field(default_factory=dict)
    """Existing references, with the time of their creation."""
    manifests: dict[str, bytes] = field(default_factory=dict)
    """Existing manifests by build."""
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Keys of each build with a manifest."""

    def watch(self, world: World) -> None:
        """Observe every effect in a world from now on."""
        world.observers.append(self._see)

    def _see(
        self, world: World, process: Process | None, verb: str, key: str, data: bytes | None
    ) -> None:
        folder = key.partition("/")[0]
        if verb == "delete":
            self._see_delete(world, process, key)
        elif data is None:
            return  # the store lied: whoever reads it has to notice
        elif folder == "refs":
            self._see_reference(world, key, data)
        elif folder == "runs":
            self._see_record(process, key)
        elif folder == "builds":
            self._see_build(world, key, data)
        elif folder == "probe":
            self._see_probe(world, process, key, data)
        elif key in self.true_objects and data != self.true_objects[key]:
            self.faults.append(f"{key} was written with other bytes than its name stands for")
        elif folder == "files" and key != f"files/{digest(data)}":
            self.faults.append(f"{key} was written with bytes of another digest")

    def _see_reference(self, world: World, key: str, data: bytes) -> None:
        parts = key.split("/")
        name, number_text = parts[1], parts[2].partition(".")[0]
        if key.endswith(".deleted"):
            # Readers look for this mark: from now on the number cannot be read.
            self.references.pop((name, int(number_text)), None)
            return
        raw = json.loads(data)
        name, number, build = raw["name"], raw["number"], raw["build"]
        if f"refs/{name}/{number:06d}.deleted" in world.objects:
            return  # a late writer: the mark says that the number is deleted, whatever is stored
        meaning = self.meanings.setdefault((name, number), build)
        if meaning != build:
            self.faults.append(
                f"{name}@{number} meant build {meaning[:6]} and now means {build[:6]}"
            )
        self.references[name, number] = world.clock.seconds
        for missing in self.missing_keys(world, build)[:1]:
            self.faults.append(f"{name}@{number} names build {build[:6]}, which lacks {missing}")

    def _see_record(self, process: Process | None, key: str) -> None:
        """A run has one record: of a second one nobody would ever write the end."""
        if process is None or key.endswith(".status.json"):
            return
        own_key = process.settings.setdefault("record", key)
        if own_key != key:
            self.faults.append(f"{process.name} made the records {own_key} and {key}")

    def _see_probe(self, world: World, process: Process | None, key: str, data: bytes) -> None:
        """The verdict on a store whose create is atomic says so.

        A run that was suspended for long can find its own probes deleted.
        """
        if process is None:
            return
        if not key.startswith("probe/verdict-"):
            process.settings.setdefault("probed", world.clock.seconds)
            return
        seconds = world.clock.seconds - process.settings.get("probed", 0.0)
        if json.loads(data) != {"atomic_create": True} and seconds < STALE.total_seconds():
            self.faults.append(f"{process.name} took the store's create for one that is not atomic")

    def _see_build(self, world: World, key: str, data: bytes) -> None:
        build = key.split("/")[1]
        if not key.endswith("/manifest.json"):
            listed = self.manifests.get(build, b"").decode()
            if f'"{key}"' in listed and digest(data) not in listed:
                self.faults.append(f"{key} was replaced by other bytes than its manifest lists")
            return
        if self.manifests.get(build, data) != data and not (
            world.is_repair or self.missing_keys(world, build) or self.needs[build] & world.damaged
        ):
            self.faults.append(f"the manifest of build {build[:6]} was replaced by another")
        self.manifests[build] = data
        self.needs[build] = needed_keys(data)

    def _see_delete(self, world: World, process: Process | None, key: str) -> None:
        settings = process.settings if process else {}
        if "grace" in settings and key in self._live_keys(world, settings["grace"]):
            self.faults.append(f"a collection deleted {key}, which a live build needs")
        is_entitled = "grace" in settings or "deletes" in settings
        if not is_entitled and any(key in needed for needed in self.needs.values()):
            self.faults.append(f"{key} of a build was deleted by {process and process.name}")
        parts = key.split("/")
        if parts[0] == "refs" and key.endswith(".json"):
            self.references.pop((parts[1], int(parts[-1].removesuffix(".json"))), None)
        if key.endswith("/manifest.json"):
            self.manifests.pop(parts[1], None)
            self.needs.pop(parts[1], None)

    def live_builds(self, world: World, grace: float) -> set[str]:
        """Return the builds that a collection must spare: newest of a name, or young."""
        newest: dict[str, int] = {}
        for name, number in self.references:
            newest[name] = max(number, newest.get(name, 0))
        now = world.clock.seconds
        live = {
            self.meanings[name, number]
            for (name, number), seconds in self.references.items()
            if number == newest[name] or now - seconds <= grace
        }
        for build in self.manifests:
            stored = world.objects.get(f"builds/{build}/manifest.json")
            if stored is not None and now - stored.seconds <= grace:
                live.add(build)
        return live

    def _live_keys(self, world: World, grace: float) -> set[str]:
        keys: set[str] = set()
        for build in self.live_builds(world, grace):
            keys |= self.needs.get(build, set())
        return keys

    def missing_keys(self, world: World, build: str) -> list[str]:
        """Return the keys of a build that do not exist, its manifest first."""
        if build not in self.needs:
            return [f"builds/{build}/manifest.json"]
        return sorted(key for key in self.needs[build] if key not in world.objects)

    def damages(self, world: World, build: str) -> list[str]:
        """Return what is wrong with a stored build: missing keys, and bytes that differ."""
        missing = self.missing_keys(world, build)
        if missing:
            return [f"{key} is missing" for key in missing]
        raw = json.loads(self.manifests[build])
        digests = {entry["key"]: entry["digest"] for entry in raw["entries"]}
        digests[raw["table"]["key"]] = raw["table"]["digest"]
        wrong = []
        for key in sorted(self.needs[build]):
            data = world.objects[key].data
            if key in self.true_objects and data != self.true_objects[key]:
                wrong.append(f"{key} has other bytes than its name stands for")
            elif key in digests and digest(data) != digests[key]:
                wrong.append(f"{key} has other bytes than the manifest lists")
            elif key in world.damaged and key.endswith(".json"):
                wrong.append(f"{key} was changed")
            elif key.startswith("files/") and key != f"files/{digest(data)}":
                wrong.append(f"{key} has bytes of another digest")
        return wrong

    def check_success(self, world: World, process: Process, build: str, number: int) -> None:
        """Record a fault if a run that reports success left no readable build under its name."""
        name = process.settings.get("reference", "omni")
        if self.meanings.get((name, number)) != build:
            self.faults.append(f"{process.name} reported {name}@{number}, which is another build")
        for damage in self.damages(world, build)[:1]:
            self.faults.append(f"{process.name} reported build {build[:6]}, but {damage}")
