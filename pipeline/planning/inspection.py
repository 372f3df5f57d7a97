"""What a checkpoint holds, and whether it merges with a base: read from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import CheckpointError, MmergeError
from mmerge.manifests.stores.open import open_readable_store
from mmerge.pipeline.planning.config_checks import list_config_differences
from mmerge.pipeline.planning.name_matching import make_renamer, match_expert
from mmerge.pipeline.planning.plan import MergePlan, make_plan
from mmerge.pipeline.planning.tokenizer_checks import list_token_differences
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.workers.adapters.checkpoint import open_expert
from mmerge.workers.adapters.files import is_adapter
from mmerge.workers.adapters.folder import AdapterFolder
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.quantization import describe_quantization
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tokenizer import read_chat_template, read_vocabulary
from mmerge.workers.families.model_config import to_architecture

_SHOWN_DIGITS = 8
_SHOWN = 50
"""Differences listed of one kind; the others are counted."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one checkpoint whose names begin alike."""

    prefix: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class AdapterSummary:
    """The LoRA adapters of one name in a folder."""

    name: str
    ranks: tuple[int, ...]
    num_modules: int
    modules: tuple[str, ...]
    """Last parts of the names of the adapted Linear layers."""


@dataclass(frozen=True)
class Difference:
    """One difference between a checkpoint and a base, with the values of both."""

    kind: str
    subject: str
    base: str
    checkpoint: str


@dataclass(frozen=True)
class MergeSummary:
    """How a checkpoint merges with a base, by a method that merges all tensors."""

    num_merged: int
    num_kept: int
    """Tensors that are the base's in the result."""
    num_copied: int
    """Tensors of the checkpoint alone: encoder, connector."""
    num_added_rows: int
    """Vocabulary rows that the base lacks."""
    renames: tuple[tuple[str, str], ...]
    """(prefix in the base, prefix in the checkpoint)."""
    dtype: str
    """Of the result."""


@dataclass(frozen=True)
class Comparison:
    """Whether a checkpoint merges with a base, and all in which they differ."""

    base: str
    refusal: str
    """The error of the plan; empty if it merges."""
    differences: tuple[Difference, ...]
    merge: MergeSummary | None = None
    """How it merges; None if it does not."""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint or a folder of adapters holds; None where a folder cannot say it."""

    uri: str
    model_type: str
    architecture: str
    files: Mapping[str, str]
    num_tensors: int
    num_bytes: int
    dtypes: Mapping[str, int]
    """Bytes by dtype."""
    quantization: str
    """The method; empty if the weights are plain."""
    family: str | None
    language_prefix: str | None
    vocabulary_rows: int | None
    tokenizer_tokens: int | None
    is_tied: bool | None
    groups: tuple[TensorGroup, ...]
    """Tensors outside the language model: encoders, connectors."""
    adapters: tuple[AdapterSummary, ...]
    problems: tuple[str, ...]
    """Why a part of this is unknown."""
    comparison: Comparison | None = None


def inspect_checkpoint(uri: str, *, base: str | None = None) -> Inspection:
    """Return what the checkpoint or adapter at `uri` holds, compared with a base if one is named.

    Raises:
        CheckpointError: the folder has no readable configuration, or its tensors cannot be read.
    """
    comparison = compare_with_base(uri, base) if base is not None else None
    if is_adapter(open_readable_store(uri)):
        return _inspect_adapter(uri, comparison)
    checkpoint = Checkpoint(uri, owner="checkpoint")
    tensors, problems = _try_tensors(checkpoint)
    family = prefix = rows = None
    groups: tuple[TensorGroup, ...] = ()
    if tensors:
        try:
            family, prefix = checkpoint.family, checkpoint.language_prefix
            rows = tensors[prefix + family.embedding].spec.shape[0]
            groups = _group_others(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
    tokens = None
    try:
        vocabulary = read_vocabulary(checkpoint)
        tokens = len(vocabulary) if vocabulary is not None else None
    except CheckpointError as error:
        problems.append(str(error))
    return Inspection(
        uri=uri,
        model_type=str(checkpoint.config.get("model_type", "")),
        architecture=to_architecture(
            checkpoint.config.get("architectures"), where=f"{uri}/config.json"
        ),
        files=checkpoint.identity,
        num_tensors=len(tensors),
        num_bytes=sum(source.spec.num_bytes for source in tensors.values()),
        dtypes=_count_dtypes(tensors),
        quantization=describe_quantization(checkpoint.config),
        family=family.name if family is not None else None,
        language_prefix=prefix,
        vocabulary_rows=rows,
        tokenizer_tokens=tokens,
        is_tied=checkpoint.is_tied(),
        groups=groups,
        adapters=(),
        problems=tuple(problems),
        comparison=comparison,
    )


def compare_with_base(uri: str, base_uri: str) -> Comparison:
    """Return whether a plan accepts an expert over a base, and every difference."""
    raw = {
        "base": base_uri,
        "method": "ties",
        "output": "inspection",
        "experts": {"checkpoint": {"path": uri, "modality": "image"}},
    }
    refusal, merge = "", None
    try:
        merge = _describe_merge(make_plan(parse_recipe(raw, folder=Path.cwd())))
    except MmergeError as error:
        refusal = Exception.__str__(error)
    try:
        base = Checkpoint(base_uri, owner="base")
        expert = open_expert(uri, owner="expert 'checkpoint'", base=base)
    except MmergeError as error:
        return Comparison(base_uri, refusal or Exception.__str__(error), (), None)
    differences: list[Difference] = []
    for compare in (_compare_properties, _compare_configs, _compare_tokens, _compare_tensors):
        try:
            differences += compare(base, expert)
        except MmergeError as error:
            # One part that cannot be compared leaves the others.
            reason = Exception.__str__(error)
            differences.append(Difference("not compared", reason, "", ""))
    return Comparison(base_uri, refusal, tuple(differences), merge)


def _describe_merge(plan: MergePlan) -> MergeSummary:
    copied = [tensor for shard in plan.carry_shards for tensor in shard.tensors]
    rows = [tensor for tensor in copied if tensor.role == "extra_rows"]
    return MergeSummary(
        num_merged=sum(len(shard.tensors) for shard in plan.merge_shards),
        num_kept=sum(len(shard.tensors) for shard in plan.base_shards),
        num_copied=len(copied) - len(rows),
        num_added_rows=max((tensor.row_stop - tensor.row_start for tensor in rows), default=0),
        renames=plan.renames[0],
        dtype=plan.dtype,
    )


def _compare_properties(base: Checkpoint, expert: Checkpoint) -> list[Difference]:
    """Return what differs between two whole checkpoints."""
    pairs = [
        ("class", *(_class_of(item) for item in (base, expert))),
        (
            "quantisation",
            *(describe_quantization(item.config) or "none" for item in (base, expert)),
        ),
        ("head", *("tied" if item.is_tied() else "its own" for item in (base, expert))),
        ("chat template", *map(_describe_template, (base, expert))),
    ]
    return [
        Difference("checkpoint", subject, ours, theirs)
        for subject, ours, theirs in pairs
        if ours != theirs
    ]


def _class_of(checkpoint: Checkpoint) -> str:
    return to_architecture(checkpoint.config.get("architectures"), where=checkpoint.uri)


def _describe_template(checkpoint: Checkpoint) -> str:
    template = read_chat_template(checkpoint)
    return "none" if template is None else f"{digest_json(template)[:_SHOWN_DIGITS]}…"


def _compare_configs(base: Checkpoint, expert: Checkpoint) -> list[Difference]:
    return [
        Difference("configuration", key, ours, theirs)
        for key, ours, theirs in list_config_differences(base, expert)
    ]


def _compare_tokens(base: Checkpoint, expert: Checkpoint) -> list[Difference]:
    return _limit(
        [
            Difference("token", subject, ours, theirs)
            for subject, ours, theirs in list_token_differences(base, expert)
        ]
    )


def _compare_tensors(base: Checkpoint, expert: Checkpoint) -> list[Difference]:
    """Return differing names, shapes and dtypes; dtypes by pair, as most differ throughout."""
    match = match_expert(base, expert)
    missing: list[Difference] = []
    shapes: list[Difference] = []
    dtypes: Counter[tuple[str, str]] = Counter()
    counterparts = set()
    renamer = make_renamer(match.renames)
    expert = match.relaid or expert
    for name, source in base.tensors.items():
        counterpart = renamer(name)
        theirs = expert.tensors.get(counterpart)
        counterparts.add(counterpart)
        if theirs is None or name in match.unmatched:
            missing.append(Difference("in the base alone", name, str(source.spec.shape), ""))
            continue
        if theirs.spec.shape != source.spec.shape:
            shape, expert_shape = source.spec.shape, theirs.spec.shape
            shapes.append(Difference("shape", name, str(shape), str(expert_shape)))
        if theirs.spec.dtype != source.spec.dtype:
            dtypes[source.spec.dtype, theirs.spec.dtype] += 1
    groups = Counter(_group_of(name) for name in expert.tensors if name not in counterparts)
    alone = [
        Difference("in the checkpoint alone", group, "", f"{count} tensors")
        for group, count in sorted(groups.items())
    ]
    pairs = [Difference("dtype", f"{count} tensors", *pair) for pair, count in dtypes.most_common()]
    return [*_limit(missing), *_limit(shapes), *pairs, *_limit(alone)]


def _limit(differences: list[Difference]) -> list[Difference]:
    if len(differences) <= _SHOWN:
        return differences
    more = f"… and {len(differences) - _SHOWN} more"
    return [*differences[:_SHOWN], Difference(differences[0].kind, more, "", "")]


def _inspect_adapter(uri: str, comparison: Comparison | None) -> Inspection:
    folder = AdapterFolder(uri, owner="adapter")
    summaries = []
    for name in folder.adapters:
        pairs = folder.pairs_of(name)
        ranks = tuple(sorted({pair.a.spec.shape[0] for pair in pairs}))
        paths = [pair.owner_module for pair in pairs]
        paths += [rows.module for rows in folder.token_rows if rows.adapter == name]
        modules = tuple(sorted({path.rpartition(".")[2] for path in paths}))
        summaries.append(AdapterSummary(name, ranks, len(pairs), modules))
    tensors = folder.tensors
    config = folder.checkpoint.config
    counts: dict[str, list[int]] = {}
    for name, source in folder.others.items():
        counts.setdefault(_group_of(name), []).append(source.spec.num_bytes)
    return Inspection(
        uri=uri,
        model_type=str(config.get("model_type", "")),
        architecture=str(config.get("base_model_name_or_path") or ""),
        files=folder.checkpoint.identity,
        num_tensors=len(tensors),
        num_bytes=sum(source.spec.num_bytes for source in tensors.values()),
        dtypes=_count_dtypes(tensors),
        quantization="",
        family=None,
        language_prefix=None,
        vocabulary_rows=None,
        tokenizer_tokens=None,
        is_tied=None,
        groups=_to_groups(counts),
        adapters=tuple(summaries),
        problems=(),
        comparison=comparison,
    )


def _try_tensors(checkpoint: Checkpoint) -> tuple[dict[str, TensorSource], list[str]]:
    """Return the tensors; none, and the reason, where a layout is not understood."""
    try:
        return checkpoint.tensors, []
    except CheckpointError as error:
        return {}, [str(error)]


def _group_others(checkpoint: Checkpoint) -> tuple[TensorGroup, ...]:
    family, prefix = checkpoint.family, checkpoint.language_prefix
    counts: dict[str, list[int]] = {}
    for name, source in checkpoint.tensors.items():
        is_language = bool(prefix) and name.startswith(prefix)
        if not is_language and not family.is_head(name):
            counts.setdefault(_group_of(name), []).append(source.spec.num_bytes)
    return _to_groups(counts)


def _to_groups(counts: Mapping[str, list[int]]) -> tuple[TensorGroup, ...]:
    return tuple(
        TensorGroup(prefix, len(sizes), sum(sizes)) for prefix, sizes in sorted(counts.items())
    )


def _group_of(name: str) -> str:
    """Return the beginning of a name that its encoder or connector shares."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("model", "thinker", "base_model") else 1])


def _count_dtypes(tensors: Mapping[str, Any]) -> dict[str, int]:
    dtypes: Counter[str] = Counter()
    for source in tensors.values():
        dtypes[source.spec.dtype] += source.spec.num_bytes
    return dict(dtypes.most_common())
