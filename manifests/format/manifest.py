"""The manifest of a build: written last, once, and never changed. A build exists once it does.

A manifest holds no time, path or host: two builders of the same recipe write the same bytes. Time,
sources and versions of a build are in its references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from mmerge.manifests.digest import (
    SHOWN_DIGITS,
    digest_bytes,
    digest_json,
    parse_json,
    to_canonical_json,
)
from mmerge.manifests.errors import (
    REPAIR,
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
    UnknownVersion,
)
from mmerge.manifests.format.entry import DIGEST_PATTERN, ObjectEntry, Record, validate_key
from mmerge.manifests.stores.base import ReadableStore

FORMAT = "mmerge-composite"
VERSION = 1
"""Version of the format: the one that is written, and the only one that is read."""

Kind = Literal["masks", "plain", "adapters"]


class FileEntry(Record):
    """A small file copied unchanged (configuration, tokenizer, processor), stored by its digest."""

    name: str = Field(pattern=r"^[^/\\\x00]{1,255}$")
    num_bytes: int = Field(ge=0)
    digest: str = Field(pattern=DIGEST_PATTERN)

    @field_validator("name")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if name in (".", ".."):
            raise ValueError(f"{name!r} is no file name")
        return name

    @property
    def key(self) -> str:
        """Key of the stored file."""
        return f"files/{self.digest}"


class BaseRecord(Record):
    """The base model: a digest of its tensors and files, and its small files."""

    revision: str
    source: str | None = None
    """`hf://ORG/REPO@COMMIT` of an input from the Hub, None of any other."""
    files: tuple[FileEntry, ...]


class AdapterRecord(Record):
    """Use of an expert's LoRA adapters in a build of kind `adapters` (DAMC, arXiv 2402.12750).

    The factors are tensors of role `adapter`: `LINEAR.lora_A.ADAPTER.weight` [rank, in] and
    `LINEAR.lora_B.ADAPTER.weight` [out, rank], where `LINEAR.weight` is the base's name.
    """

    modality_adapter: str
    """Adapter of this expert's modality tokens, including its learned prefix and suffix tokens."""
    default_adapter: str
    """Adapter of text tokens, including generated ones."""
    coefficient: float
    """Parameter adjustment coefficient c of the default adapter."""
    scale: float
    """Factor of B·A: alpha / rank."""
    other_scales: dict[str, float] = Field(default_factory=dict)
    """Scales that differ from `scale`, by "LINEAR.weight:ADAPTER"."""

    def scale_of(self, linear: str, adapter: str) -> float:
        """Return the scale of an adapter in the Linear layer whose weight is `linear`."""
        return self.other_scales.get(f"{linear}:{adapter}", self.scale)


class ExpertRecord(Record):
    """One expert: its identity, and how its files name the tensors that it shares with the base."""

    name: str
    modality: str
    revision: str
    source: str | None = None
    """As in `BaseRecord`."""
    parameters: dict[str, Any]
    renames: tuple[tuple[str, str], ...]
    """(prefix in the base, prefix in the expert's files), longest first."""
    placeholder: str | None = None
    template: str | None = None
    rescaler: float | None = None
    """Factor on this expert's masked τ⋆ (EMR); 1 if absent."""
    adapters: AdapterRecord | None = None
    """In builds of kind `adapters`, None in others."""
    layout: Literal["base"] | None = None
    """`base` where the expert's own files hold mixtures of experts in another layout, fused or one
    matrix per expert; its names in `renames` are then those of the base's layout.
    """
    files: tuple[FileEntry, ...]


class TableEntry(Record):
    """Key, size and digest of the Parquet table of tensors."""

    key: str
    num_bytes: int = Field(ge=0)
    digest: str = Field(pattern=DIGEST_PATTERN)

    @field_validator("key")
    @classmethod
    def _stays_inside(cls, key: str) -> str:
        return validate_key(key)


class WarningsRecord(Record):
    """What differs between the inputs of a build though names and shapes agree.

    The digest of the build does not cover it: it follows from the inputs, and later versions may
    find more.
    """

    lines: tuple[str, ...]
    """One sentence each, as `plan` prints them; without the paths of the inputs."""
    checksum: str = Field(pattern=DIGEST_PATTERN)
    """Digest of `lines`."""

    @classmethod
    def make(cls, lines: Sequence[str]) -> WarningsRecord | None:
        """Return the record of some warnings, None if there are none."""
        return cls(lines=tuple(lines), checksum=digest_json(list(lines))) if lines else None

    @property
    def is_whole(self) -> bool:
        """Whether the checksum is that of the lines."""
        return self.checksum == digest_json(list(self.lines))


class Manifest(Record):
    """One build; `build` is the digest of its recipe and inputs."""

    format: Literal["mmerge-composite"] = "mmerge-composite"
    version: Literal[1] = 1
    build: str = Field(pattern=DIGEST_PATTERN)
    kind: Kind
    method: str
    parameters: dict[str, Any]
    merge: Literal["all", "linear"]
    dtype: str
    template: str | None = None
    chat_template_from: str | None = None
    """Whose chat template forms prompts: `base`, `none`, or an expert; by default as the inputs of
    a prompt say.
    """
    base: BaseRecord
    experts: tuple[ExpertRecord, ...]
    entries: tuple[ObjectEntry, ...]
    table: TableEntry
    warnings: WarningsRecord | None = None

    def to_expert(self, name: str) -> ExpertRecord:
        """Return the record of one expert. Raises ManifestError if there is none of that name."""
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise ManifestError(
            f"build {self.build[:12]} has no expert {name!r}; it has"
            f" {', '.join(expert.name for expert in self.experts)}"
        )

    def rename(self, name: str, *, expert: str) -> str:
        """Return the name that a tensor of the base has in the files of an expert."""
        for base_prefix, expert_prefix in self.to_expert(expert).renames:
            if name.startswith(base_prefix):
                return expert_prefix + name[len(base_prefix) :]
        return name

    def unique_files(self) -> list[FileEntry]:
        """Return the small files of base and experts, each digest once."""
        files = {file.digest: file for file in self.base.files}
        for expert in self.experts:
            files |= {file.digest: file for file in expert.files}
        return list(files.values())


IDENTITY_FIELDS = ("kind", "method", "parameters", "merge", "dtype", "template", "base", "experts")
"""Fields of a manifest of which, with the keys of its objects, `build` is the digest."""


def to_fields(manifest: Manifest) -> dict[str, Any]:
    """Return the fields that describe recipe, base and experts, by name."""
    fields = {name: getattr(manifest, name) for name in IDENTITY_FIELDS}
    if manifest.chat_template_from is not None:
        # Left out where it is absent: builds from before it was added keep their digests.
        fields["chat_template_from"] = manifest.chat_template_from
    return fields


def make_manifest_schema() -> dict[str, Any]:
    """Return the JSON schema of manifests, as stored in `manifests/manifest.schema.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(),
        "title": "mmerge composite manifest",
    }


def manifest_key(build: str) -> str:
    """Return the key of a build's manifest."""
    return f"builds/{build}/manifest.json"


def to_manifest_bytes(manifest: Manifest) -> bytes:
    """Return the stored form of a manifest."""
    return to_canonical_json(manifest.model_dump(mode="json", exclude_none=True)) + b"\n"


def digest_manifest(manifest: Manifest) -> str:
    """Return the digest of a manifest without `table` and `warnings`, which references hold.

    Parquet files of equal rows differ, and the rows are covered by the entries. Warnings have a
    checksum of their own.
    """
    excluded = {"table", "warnings"}
    return digest_json(manifest.model_dump(mode="json", exclude_none=True, exclude=excluded))


def needed_keys(manifest: Manifest) -> set[str]:
    """Return every key of a build, with the entries by which a later run finds its objects."""
    files = {file.key for file in manifest.unique_files()}
    objects = {entry.key for entry in manifest.entries}
    entries = {key.removesuffix(".safetensors") + ".json" for key in objects}
    return {manifest_key(manifest.build), manifest.table.key} | files | objects | entries


def read_manifest(store: ReadableStore, build: str) -> Manifest:
    """Return the manifest of a build.

    Raises:
        ManifestError: it is missing or damaged, or its version is unknown.
    """
    key = manifest_key(build)
    where = f"{store.uri}: {key}"
    try:
        data = store.read(key)
    except StoreUnavailable:
        raise
    except NotFound:
        raise ManifestError(
            f"{where}: no such build. 'mmerge show {store.uri}' lists the composites"
        ) from None
    try:
        raw = parse_json(data, what="manifest")
    except ValueError as error:
        raise ManifestError(f"{where}: {error}. The manifest is damaged. {REPAIR}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ManifestError(f"{where}: is no {FORMAT} manifest. {REPAIR}")
    _check_version(store, build, raw.get("version"))
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestError(
            f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}. The manifest is damaged."
            f" {REPAIR}"
        ) from error
    if manifest.build != build:
        raise ManifestError(
            f"{where}: describes build {manifest.build[:12]}, not {build[:12]}. The manifest is"
            f" damaged. {REPAIR}"
        )
    return manifest


def _check_version(store: ReadableStore, build: str, version: object) -> None:
    if version == VERSION:
        return
    where = f"{store.uri}: {manifest_key(build)}: has format version {version!r}"
    if not isinstance(version, int) or version < VERSION:
        raise ManifestError(f"{where}, which does not exist. The manifest is damaged. {REPAIR}")
    raise UnknownVersion(
        f"{where}, this mmerge reads version {VERSION}. Use the mmerge that wrote it, or a newer"
        " one; if there is none that writes this version, the manifest is damaged: 'mmerge delete"
        f" {store.uri}#{build[:SHOWN_DIGITS]} --yes', then run the recipe again"
    )


def read_file(store: ReadableStore, entry: FileEntry) -> bytes:
    """Return the bytes of a small stored file.

    Raises:
        NotFound: the file is missing.
        ManifestError: its size or digest differs from the manifest.
    """
    try:
        data = store.read(entry.key, max_bytes=entry.num_bytes)
    except (NotFound, StoreUnavailable):
        raise
    except StoreError as error:
        raise ManifestError(
            f"{Exception.__str__(error)}, the manifest says {entry.num_bytes:,}: {entry.name} is"
            f" damaged. {REPAIR}"
        ) from error
    digest = digest_bytes(data)
    if (len(data), digest) != (entry.num_bytes, entry.digest):
        raise ManifestError(
            f"{store.uri}: {entry.key} ({entry.name}) is damaged: it has {len(data):,} bytes of"
            f" digest {digest[:SHOWN_DIGITS]}, the manifest says {entry.num_bytes:,} of"
            f" {entry.digest[:SHOWN_DIGITS]}. {REPAIR}"
        )
    return data
