"""LoRA of parameters outside Linear layers (`target_parameters`): stacks of experts.

PEFT wraps the module that owns the parameters once per parameter, so the files say neither which
parameter a pair of factors belongs to nor in which form the base's files hold it. Shapes tell the
first, the base's class in transformers the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.tensor_names import split_layer
from mmerge.workers.adapters.folder import AdapterFolder, AdapterPair
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.formed_sources import LowRankSource, make_formed_spec
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.fused_parameters import ParameterLayout, Region, find_layouts
from mmerge.workers.families.interface import strip_wrapper
from mmerge.workers.families.name_map import UnknownClass, map_names

_DECODER = "decoder."


@dataclass(frozen=True)
class FormAdapted:
    """Forms one of the base's tensors with the part of an adapter that belongs to it."""

    pair: AdapterPair
    scale: float
    num_matrices: int
    first_row: int
    is_transposed: bool

    def __call__(self, base: TensorSource) -> LowRankSource:
        """Return the adapted tensor."""
        return LowRankSource(
            self.pair.a.uri,
            self.pair.a.file,
            make_formed_spec(base.spec),
            base=base,
            a=self.pair.a,
            b=self.pair.b,
            scale=self.scale,
            num_matrices=self.num_matrices,
            first_row=self.first_row,
            is_transposed=self.is_transposed,
        )


@dataclass(frozen=True)
class PlacedPair:
    """A pair of factors and the base's tensors that it adapts; None where it fits none."""

    pair: AdapterPair
    weights: Mapping[str, FormAdapted] | None


def place_parameters(
    folder: AdapterFolder, pairs: Sequence[AdapterPair], base: Checkpoint
) -> Iterator[PlacedPair]:
    """Yield where each pair of an adapter belongs that is not of a Linear layer.

    Raises:
        CheckpointError: transformers does not know the base, so that the form of its parameters is
            unknown; or which parameter a pair belongs to is unclear.
    """
    if not pairs:
        return
    layouts = _read_layouts(folder, base)
    used: set[str] = set()
    for pair in pairs:
        fitting = {
            canonical: layout
            for canonical, layout in layouts.items()
            if _is_target(canonical, pair, folder) and _fit(pair, layout) is not None
        }
        _refuse_unclear_sides(folder, pair, fitting)
        if len(fitting) > 1 or used & fitting.keys():
            raise CheckpointError(
                f"{folder.owner}: {folder.uri}: {pair.module}: its factors fit"
                f" {' and '.join(sorted(fitting))}, so it is unclear which parameter they adapt."
                " Merge the adapter first (PEFT: merge_and_unload, save_pretrained)"
            )
        if not fitting:
            yield PlacedPair(pair, None)
            continue
        canonical, layout = next(iter(fitting.items()))
        used.add(canonical)
        yield PlacedPair(pair, _form(folder, pair, canonical, layout))


def _read_layouts(folder: AdapterFolder, base: Checkpoint) -> dict[str, ParameterLayout]:
    shapes = {name: source.spec.shape for name, source in base.tensors.items()}
    try:
        return find_layouts(map_names(base.config, shapes), shapes)
    except UnknownClass as error:
        raise CheckpointError(
            f"{folder.owner}: {folder.uri} adapts parameters outside Linear layers"
            f" (target_parameters), and the form of the base's is unknown:"
            f" {Exception.__str__(error)}. Merge the adapter first (PEFT: merge_and_unload,"
            " save_pretrained)"
        ) from error


def _is_target(canonical: str, pair: AdapterPair, folder: AdapterFolder) -> bool:
    """Return whether a parameter of the language model is one that an adapter's module owns."""
    owner, _, name = canonical.removeprefix(_DECODER).rpartition(".")
    path = strip_wrapper(pair.owner_module)
    if not canonical.startswith(_DECODER) or split_layer(path) is None or path != owner:
        return False
    full = f".{pair.owner_module}.{name}"
    return any(full.endswith(f".{end}") for end in folder.target_parameters(pair.adapter))


def _fit(pair: AdapterPair, layout: ParameterLayout) -> bool | None:
    """Return whether (B·A)ᵀ is added to each matrix of a parameter, None where neither fits.

    PEFT makes A of the parameter's inputs. Its releases before 0.18 took the first dimension of
    each matrix for them, later ones ask the class.
    """
    if len(layout.shape) not in (2, 3) or pair.is_embedding or len(pair.a.spec.shape) != 2:
        return None
    sides = (pair.b.spec.shape[0], pair.a.spec.shape[1])
    rows, columns = layout.shape[-2:]
    if pair.rank % layout.num_matrices or sides not in ((rows, columns), (columns, rows)):
        return None
    if rows == columns:
        return layout.is_transposed and len(layout.shape) == 3
    return sides == (columns, rows)


def _refuse_unclear_sides(
    folder: AdapterFolder, pair: AdapterPair, layouts: Mapping[str, ParameterLayout]
) -> None:
    """Raise CheckpointError where the sides of a square matrix depend on PEFT's release.

    Releases that ask the class write their number into the configuration.
    """
    config = folder.checkpoint.configs.get(pair.adapter, folder.checkpoint.config)
    for canonical, layout in layouts.items():
        is_square = layout.shape[-1] == layout.shape[-2]
        if is_square and not layout.is_transposed and not config.get("peft_version"):
            raise CheckpointError(
                f"{folder.owner}: {folder.uri}: {pair.module}: {canonical} has square matrices, and"
                " whether an adapter of it is transposed depends on the release of PEFT, which"
                " adapter_config.json does not name (peft_version). Merge the adapter first"
                " (PEFT: merge_and_unload, save_pretrained)"
            )


def _form(
    folder: AdapterFolder, pair: AdapterPair, canonical: str, layout: ParameterLayout
) -> dict[str, FormAdapted]:
    name = canonical.rpartition(".")[2]
    scale = folder.scale_of(
        pair, parameter=f"{pair.owner_module}.{name}", num_matrices=layout.num_matrices
    )
    is_transposed = bool(_fit(pair, layout))

    def form(region: Region) -> FormAdapted:
        return FormAdapted(
            pair,
            scale,
            layout.num_matrices,
            region.first_row,
            is_transposed != region.is_transposed,
        )

    return {stored: form(region) for stored, region in layout.regions.items()}
