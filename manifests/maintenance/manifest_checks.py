"""Consistency of a manifest with itself: its name, its entries, its files, its provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.entry import ObjectEntry
from mmerge.manifests.format.identity import recompute_build_digest
from mmerge.manifests.format.manifest import (
    FileEntry,
    Manifest,
    manifest_key,
    read_manifest,
)
from mmerge.manifests.maintenance.damage import Damage, make_error
from mmerge.manifests.stores.base import ReadableStore

_OBJECT_KEY = re.compile(r"objects/[0-9a-f]{64}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
EXPERT_INPUT = "expert:"
"""Prefix of an expert's digest among the `inputs` of a merged object."""


def read_consistent_manifest(store: ReadableStore, build: str) -> Manifest:
    """Return a manifest by which objects may be deleted: it names all that its build needs.

    Raises:
        ManifestError: it is missing, damaged, or contradicts its name or itself: it may have lost
            an object, or list one that is none of its own.
    """
    manifest = read_manifest(store, build)
    damages = find_manifest_damages(manifest)
    if damages:
        raise make_error(store.uri, [damage.sentence for damage in damages])
    return manifest


def find_manifest_damages(manifest: Manifest) -> list[Damage]:
    """Return where a manifest contradicts its name or itself.

    The name covers recipe, base, experts, files and the keys of all objects, in their order. The
    remaining fields are held against each other here, and against entries and table elsewhere.
    """
    key = manifest_key(manifest.build)
    reasons = [
        *_check_entries(manifest),
        *_check_files(manifest),
        *_check_kind(manifest),
        *_check_inputs(manifest),
        *_check_warnings(manifest),
    ]
    digest = recompute_build_digest(manifest)
    if digest != manifest.build:
        reasons.insert(
            0,
            f"its recipe, inputs and objects give build {digest[:12]}, its name is"
            f" {manifest.build[:12]}: a field was changed",
        )
    if not manifest.table.key.startswith(f"builds/{manifest.build}/"):
        reasons.append(
            f"its table is {manifest.table.key}, expected a key below builds/{manifest.build}/"
        )
    return [Damage(key, f"{key}: {reason}") for reason in reasons]


def _check_entries(manifest: Manifest) -> Iterator[str]:
    names = {expert.name for expert in manifest.experts}
    contents: dict[str, tuple[str, int, str]] = {}
    shards: set[str] = set()
    for entry in manifest.entries:
        if not _OBJECT_KEY.fullmatch(entry.key):
            yield f"{entry.shard}: {entry.key} is no key of an object"
        if entry.shard in shards:
            yield f"shard {entry.shard} stands twice"
        shards.add(entry.shard)
        content = (entry.role, entry.num_bytes, entry.digest)
        if contents.setdefault(entry.key, content) != content:
            yield (
                f"{entry.key} has {content} as {entry.shard} and {contents[entry.key]} as another"
                " shard"
            )
        if entry.role != "carry" and entry.expert:
            yield f"{entry.shard}: an object of role {entry.role} is of expert {entry.expert!r}"
        if entry.role == "carry" and entry.expert not in names:
            yield f"{entry.shard}: there is no expert {entry.expert!r}"


def _check_files(manifest: Manifest) -> Iterator[str]:
    sizes: dict[str, int] = {}
    owners: list[tuple[str, tuple[FileEntry, ...]]] = [("base", manifest.base.files)]
    owners += [(f"expert {expert.name!r}", expert.files) for expert in manifest.experts]
    for owner, files in owners:
        if len({file.name for file in files}) < len(files):
            yield f"{owner}: two files have one name"
        for file in files:
            if sizes.setdefault(file.digest, file.num_bytes) != file.num_bytes:
                yield (
                    f"{owner}: {file.name} has {file.num_bytes:,} bytes, another file of that"
                    f" digest {sizes[file.digest]:,}"
                )


def _check_kind(manifest: Manifest) -> Iterator[str]:
    names = [expert.name for expert in manifest.experts]
    if len(set(names)) < len(names):
        yield "two experts have one name"
    for expert in manifest.experts:
        if (expert.adapters is not None) != (manifest.kind == "adapters"):
            yield f"expert {expert.name!r}: 'adapters' and kind {manifest.kind} contradict"
        if expert.rescaler is not None and manifest.kind != "masks":
            yield f"expert {expert.name!r}: has a rescaler in a build of kind {manifest.kind}"
    if manifest.kind == "adapters":
        merged = [entry.shard for entry in manifest.entries if entry.role == "merge"]
        if merged:
            yield f"shard {merged[0]} is merged in a build of kind adapters"


def _check_warnings(manifest: Manifest) -> Iterator[str]:
    if manifest.warnings is not None and not manifest.warnings.is_whole:
        yield "the checksum of its warnings is not that of their lines"


def _check_inputs(manifest: Manifest) -> Iterator[str]:
    """Hold the provenance of merged objects against the recipe: names, digests, parameters."""
    names = {"base", "numbers", "thresholds"}
    names |= {EXPERT_INPUT + expert.name for expert in manifest.experts}
    parameters = [manifest.parameters, *(expert.parameters for expert in manifest.experts)]
    numbers = digest_json([manifest.method, parameters, manifest.dtype])
    for entry in manifest.entries:
        yield from _check_entry_inputs(entry, names, numbers)


def _check_entry_inputs(entry: ObjectEntry, names: set[str], numbers: str) -> Iterator[str]:
    if entry.role != "merge":
        if entry.inputs is not None:
            yield f"{entry.shard}: 'inputs' of an object that is not merged"
        return
    inputs = entry.inputs or {}
    if set(inputs) != names:
        yield f"{entry.shard}: 'inputs' names {sorted(inputs)}, expected {sorted(names)}"
        return
    for name, digest in inputs.items():
        if not _DIGEST.fullmatch(digest):
            yield f"{entry.shard}: 'inputs.{name}' is {digest[:80]!r}, expected 64 hex digits"
    if inputs["numbers"] != numbers:
        yield (
            f"{entry.shard}: 'inputs.numbers' is {inputs['numbers'][:12]}, method, parameters and"
            f" dtype give {numbers[:12]}"
        )
