"""Upload a composite or an exported checkpoint to the Hugging Face Hub, in one atomic commit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from mmerge.manifests.errors import BuildDiffers, ManifestError, NotFound, StoreError
from mmerge.manifests.format.entry import digest_of_object, find_entry
from mmerge.manifests.format.manifest import (
    Manifest,
    digest_manifest,
    manifest_key,
    needed_keys,
    read_manifest,
)
from mmerge.manifests.format.publish import find_whole_manifest
from mmerge.manifests.format.references import (
    Reference,
    ReferenceNumbers,
    find_reference,
    list_reference_numbers,
    open_build,
    read_reference,
    split_uri,
    to_reference_bytes,
)
from mmerge.manifests.format.table import read_table
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.maintenance.signatures import find_exported_folder, list_signatures
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.hub import HubStore, make_hub_api, split_hub_uri, translate_hub_errors
from mmerge.manifests.stores.open import is_local, to_local_path


@dataclass(frozen=True)
class PushReport:
    """The result of a push; `uri` names the commit."""

    uri: str
    num_files: int


def push(
    source: str, target: str, *, private: bool = False, message: str | None = None
) -> PushReport:
    """Upload `source` to the repository `target`; return the commit.

    A composite is verified before it is sent; it can then be loaded from `hf://ORG/REPO#NAME`.

    Args:
        source: the URI of a composite, or a folder that `mmerge export` wrote.
        target: hf://ORG/REPO or hf://ORG/REPO@BRANCH; a missing repository is made.
        private: whether a new repository is private.
        message: the message of the commit.

    Raises:
        BuildDiffers: the repository has the build, or one of its objects, with other bytes.
        DamagedObject, ManifestError: the composite is damaged or missing.
        StoreError: the hub refuses, or does not answer.
    """
    repo, branch = split_hub_uri(target)
    folder = find_exported_folder(source)
    if folder is not None:
        files: dict[str, Path | bytes] = {
            path.name: path for path in sorted(folder.iterdir()) if path.is_file()
        }
        return _commit(
            repo,
            branch,
            files,
            private=private,
            message=message or "Upload a checkpoint made by mmerge",
        )
    with _local_build(source) as (local, reference):
        store, build = open_build(local)
        verify(local).check()
        manifest = read_manifest(store, build)
        _make_repo(repo, private=private)
        hub = _open_hub(f"hf://{repo}@{branch}")
        needed = needed_keys(manifest)
        number, is_present = 1, False
        if hub is not None:
            needed -= _find_kept_keys(hub, manifest)
            number, is_present = _next_number(hub, reference.name, build)
        keys = [key for key in sorted(needed) if store.exists(key)]
        if manifest_key(build) in needed:
            keys += list_signatures(store, build)
        root = to_local_path(split_uri(local)[0])
        files = {key: root / key for key in keys}
        if not is_present:
            numbered = reference.model_copy(update={"number": number})
            files[numbered.key] = to_reference_bytes(numbered)
        return _commit(
            repo,
            branch,
            files,
            private=private,
            message=message or f"Upload {reference.name}, build {build[:12]}",
            parent=hub.commit if hub is not None else None,
        )


@contextmanager
def _local_build(uri: str) -> Iterator[tuple[str, Reference]]:
    """Yield the local URI of a build, and its reference; a remote build is copied temporarily."""
    store_uri, fragment = split_uri(uri)
    store, build = open_build(uri)
    reference = find_reference(store, fragment, build)
    if reference is None:
        raise ManifestError(
            f"{uri}: no name points to build {build[:12]}. Add one with 'mmerge copy --name'"
        )
    if is_local(store_uri):
        yield f"{store_uri}#{build}", reference
        return
    with tempfile.TemporaryDirectory(prefix="mmerge-push-") as folder:
        copy_build(uri, folder)
        yield f"{folder}#{build}", reference


def _open_hub(uri: str) -> HubStore | None:
    """Return a branch of a repository at its newest commit, None where there is no such branch."""
    try:
        return HubStore.open(uri, create=False)
    except NotFound:
        return None


def _find_kept_keys(hub: HubStore, manifest: Manifest) -> set[str]:
    """Return the keys of a build that the repository keeps: of a manifest with another table.

    Raises:
        BuildDiffers: the repository has the build, or one of its objects, with other bytes.
    """
    stored = find_whole_manifest(hub, manifest.build)
    entries = [find_entry(hub, digest_of_object(entry.key)) for entry in manifest.entries]
    differing = set()
    stored_digests = {} if stored is None else {entry.key: entry.digest for entry in stored.entries}
    for entry, hub_entry in zip(manifest.entries, entries, strict=True):
        digests = {stored_digests.get(entry.key, entry.digest)}
        if hub_entry is not None:
            digests.add(hub_entry.object.digest)
        if digests != {entry.digest}:
            differing.add(entry.shard)
    if differing:
        raise BuildDiffers(
            f"{hub.uri}: has other bytes of shard {', '.join(sorted(differing))}: nothing was"
            " replaced. Push to another branch or repository: 'mmerge push SOURCE"
            " hf://ORG/REPO@BRANCH'"
        )
    if stored is None or digest_manifest(stored) != digest_manifest(manifest):
        return set()
    if stored.table == manifest.table:
        return set()
    try:
        read_table(hub, stored.table)
    except ManifestError:
        return set()  # the repository's table is damaged
    return {manifest_key(manifest.build), manifest.table.key}


def _next_number(hub: HubStore, name: str, build: str) -> tuple[int, bool]:
    """Return the number of a reference on the Hub, and whether it is there already."""
    numbers = list_reference_numbers(hub, name).get(name, ReferenceNumbers())
    if numbers.live and read_reference(hub, name, numbers.live[-1]).build == build:
        return numbers.live[-1], True
    return numbers.next_number, False


def _make_repo(repo: str, *, private: bool) -> None:
    translate_hub_errors(
        repo, "create", lambda: make_hub_api().create_repo(repo, private=private, exist_ok=True)
    )


def _commit(
    repo: str,
    branch: str,
    files: dict[str, Path | bytes],
    *,
    private: bool,
    message: str,
    parent: str | None = None,
) -> PushReport:
    """Upload files in one commit, which with `parent` follows that commit or fails."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    if not files:
        raise StoreError(f"hf://{repo}: nothing to push")
    _make_repo(repo, private=private)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=key, path_or_fileobj=data) for key, data in files.items()
    ]

    def send() -> str:
        try:
            commit_info = make_hub_api().create_commit(
                repo, operations, commit_message=message, revision=branch, parent_commit=parent
            )
        except HfHubHTTPError as error:
            if error.response.status_code == HTTPStatus.PRECONDITION_FAILED:
                raise StoreError(
                    f"hf://{repo}@{branch}: somebody else has pushed there meanwhile: nothing was"
                    " changed. Push again"
                ) from error
            raise
        return str(commit_info.oid)

    commit = translate_hub_errors(repo, f"commit to {branch}", send)
    return PushReport(f"hf://{repo}@{commit}", len(files))
