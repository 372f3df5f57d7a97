"""Models put together from slices of layers: repeated, left out, reordered, of several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.tensor_names import move_layer, split_layer
from mmerge.pipeline.planning.config_checks import check_sizes
from mmerge.pipeline.planning.layer_config import StackedLayer, count_layers, stack_configs
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.derived import Changes, DerivedCheckpoint
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.interface import Family


@dataclass(frozen=True)
class OpenSlice:
    """Successive layers of an open checkpoint; `first` and `last` are both included."""

    checkpoint: Checkpoint
    first: int
    last: int

    @property
    def layers(self) -> range:
        """Its layers' numbers in the checkpoint."""
        return range(self.first, self.last + 1)


def stack_slices(slices: Sequence[OpenSlice]) -> Checkpoint:
    """Return the checkpoint that has the layers of all slices, numbered anew from 0.

    What comes before the layers (embeddings; encoders and connectors) is that of the first slice's
    checkpoint, the last norm and the head are those of the last slice's.

    Raises:
        CheckpointError: a slice goes beyond the layers, the models differ in their sizes or in what
            they tie, or the configuration cannot describe the layers.
    """
    first = slices[0].checkpoint
    for part in slices:
        _check_slice(part, first)
    last = slices[-1].checkpoint
    if first.is_tied() != last.is_tied():
        raise CheckpointError(
            f"{last.owner}: {last.uri}: ties its head to the embedding or {first.uri} does, not"
            " both: the embedding would be of the one and the head of the other. Begin and end with"
            " slices of models that agree"
        )
    tensors: dict[str, TensorSource] = {}
    for name, source in first.tensors.items():
        if not _is_in_layers(name, first) and not is_after_layers(name, first):
            tensors[name] = source
    for name, source in last.tensors.items():
        if not _is_in_layers(name, last) and is_after_layers(name, last):
            new_name = _to_names_of(first, name, last)
            tensors[new_name] = _with_name(source, new_name)
    layers: list[StackedLayer] = []
    for part in slices:
        for layer in part.layers:
            for name, source in _layer_tensors(part.checkpoint, layer):
                new_name = move_layer(_to_names_of(first, name, part.checkpoint), len(layers))
                tensors[new_name] = _with_name(source, new_name)
            layers.append(StackedLayer(part.checkpoint, layer))
    changes = Changes(tensors=tensors, config=stack_configs(layers))
    stacked = DerivedCheckpoint(first, changes, parts=[part.checkpoint for part in slices])
    _check_vocabulary(stacked)
    return stacked


def is_after_layers(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor outside the layers is the language model's last norm or head."""
    family = checkpoint.family
    module = name.rpartition(".")[0]
    if family.is_head(name) or family.is_head(f"{module}.weight"):
        return True
    return module == f"{checkpoint.language_prefix}{family.final_norm}"


def _check_slice(part: OpenSlice, first: Checkpoint) -> None:
    checkpoint = part.checkpoint
    num_layers = count_layers(checkpoint)
    if part.last >= num_layers:
        raise CheckpointError(
            f"{checkpoint.owner}: {checkpoint.uri} has {num_layers} layers, 0 to {num_layers - 1};"
            f" a slice asks for {part.first} to {part.last}"
        )
    _find_output_path(checkpoint)
    if checkpoint is first:
        return
    check_sizes(first, checkpoint, ignores_layers=True)
    if _paths_of(checkpoint) != _paths_of(first):
        odd = sorted(_paths_of(checkpoint) ^ _paths_of(first))
        raise CheckpointError(
            f"{checkpoint.owner}: layers of {checkpoint.uri} and of {first.uri} have other tensors"
            f" ({odd[0]} is in one of them alone), so one model cannot have both"
        )


def _find_output_path(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where last norm and head are not known by name."""
    if not any(is_after_layers(name, checkpoint) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.owner}: {checkpoint.uri}: neither last norm nor head of its language"
            " model are known by name, so that slices of its layers have no end. Add its names as a"
            " model family (docs/add-a-family.md)"
        )


def _paths_of(checkpoint: Checkpoint) -> set[str]:
    """Return the names of tensors below their layer in the language model.

    Numbers of experts in a layer are names, too: they must agree.
    """
    prefix = checkpoint.language_prefix
    splits = [split_layer(name) for name in checkpoint.tensors]
    return {split.path for split in splits if split is not None and split.prefix == prefix}


def _layer_tensors(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, TensorSource]]:
    for name, source in checkpoint.tensors.items():
        split = split_layer(name)
        if split is not None and (split.prefix, split.layer) == (checkpoint.language_prefix, layer):
            yield name, source


def _is_in_layers(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is in a layer of the language model; encoders have layers, too."""
    split = split_layer(name)
    return split is not None and split.prefix == checkpoint.language_prefix


def _to_names_of(first: Checkpoint, name: str, checkpoint: Checkpoint) -> str:
    """Return a tensor's name as the first checkpoint would have it."""
    if checkpoint is first:
        return name
    family = checkpoint.family
    if family.is_head(name):
        return _find_head(first) or name
    if name.startswith(checkpoint.language_prefix):
        return first.language_prefix + name[len(checkpoint.language_prefix) :]
    return name


def _find_head(checkpoint: Checkpoint) -> str | None:
    return next((name for name in checkpoint.tensors if checkpoint.family.is_head(name)), None)


def _with_name(source: TensorSource, name: str) -> TensorSource:
    return replace(source, spec=replace(source.spec, name=name))


def _check_vocabulary(stacked: Checkpoint) -> None:
    """Raise CheckpointError if the head has other rows than the embedding of another model."""
    family: Family = stacked.family
    rows = {
        name: source.spec.shape[0]
        for name, source in stacked.tensors.items()
        if family.is_vocabulary(name)
    }
    if len(set(rows.values())) > 1:
        shown = ", ".join(f"{name} has {count:,} rows" for name, count in rows.items())
        raise CheckpointError(
            f"{stacked.owner}: embedding and head of its slices do not fit ({shown}). Give a"
            " 'tokenizer', by which rows are matched by token"
        )
