"""What a checkpoint holds, and whether it merges with a base: read from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.errors import CheckpointError, MmergeError
from mmerge.manifests.stores.open import open_readable_store
from mmerge.pipeline.planning.config_checks import list_config_warnings
from mmerge.pipeline.planning.name_matching import NameMatch, make_renamer, match_expert
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.planning.tokenizer_checks import list_tokenizer_warnings
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.workers.adapters.checkpoint import open_expert
from mmerge.workers.adapters.files import is_adapter
from mmerge.workers.adapters.folder import AdapterFolder
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.quantization import describe_quantization
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tokenizer import read_vocabulary
from mmerge.workers.families.model_config import to_architecture

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
    """One difference between a checkpoint and a base: a name, a shape, or a warning of a plan."""

    kind: str
    subject: str
    base: str
    checkpoint: str


@dataclass(frozen=True)
class Comparison:
    """Whether a checkpoint merges with a base, and all in which they differ."""

    base: str
    refusal: str
    """The error of the plan; empty if it merges."""
    differences: tuple[Difference, ...]


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
    refusal = ""
    try:
        make_plan(parse_recipe(raw, folder=Path.cwd()))
    except MmergeError as error:
        refusal = Exception.__str__(error)
    differences: list[Difference] = []
    try:
        base = Checkpoint(base_uri, owner="base")
        expert = open_expert(uri, owner="expert 'checkpoint'", base=base)
        match = match_expert(base, expert)
        differences += _compare_tensors(base, expert, match)
        for warning in (
            *list_config_warnings(base, expert),
            *list_tokenizer_warnings(base, [expert]),
        ):
            differences.append(
                Difference("warning", warning.removeprefix(f"{expert.owner}: "), "", "")
            )
    except MmergeError as error:
        # The plan says the same where it is refused; a plan that is accepted has read all of it.
        refusal = refusal or Exception.__str__(error)
    return Comparison(base_uri, refusal, tuple(differences))


def _compare_tensors(base: Checkpoint, expert: Checkpoint, match: NameMatch) -> list[Difference]:
    missing: list[Difference] = []
    shapes: list[Difference] = []
    counterparts = set()
    renamer = make_renamer(match.renames)
    expert = match.relaid or expert
    for name, source in base.tensors.items():
        counterpart = renamer(name)
        theirs = expert.tensors.get(counterpart)
        counterparts.add(counterpart)
        if theirs is None or name in match.unmatched:
            missing.append(Difference("in the base alone", name, str(source.spec.shape), ""))
        elif theirs.spec.shape != source.spec.shape:
            shape, expert_shape = source.spec.shape, theirs.spec.shape
            shapes.append(Difference("shape", name, str(shape), str(expert_shape)))
        elif theirs.spec.dtype != source.spec.dtype:
            shapes.append(Difference("dtype", name, source.spec.dtype, theirs.spec.dtype))
    groups = Counter(_group_of(name) for name in expert.tensors if name not in counterparts)
    alone = [
        Difference("in the checkpoint alone", group, "", f"{count} tensors")
        for group, count in sorted(groups.items())
    ]
    return [*_limit(missing), *_limit(shapes), *_limit(alone)]


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
