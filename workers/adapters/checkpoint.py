"""LoRA adapters as experts: the base's weights with what an adapter adds to them."""

from __future__ import annotations

from functools import cached_property

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, NotFound, ShapeMismatch, StoreError
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.adapters.files import CONFIG_FILE, is_adapter
from mmerge.workers.adapters.folder import AdapterFolder, AdapterPair, TokenRows
from mmerge.workers.adapters.parameters import place_parameters
from mmerge.workers.adapters.placement import ModulePlacer
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.expert_only import describe_names
from mmerge.workers.checkpoints.formed_sources import (
    LowRankSource,
    ReplacedRowsSource,
    make_formed_spec,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tied_head import drop_tied_head

REMEDY = (
    "Merge the adapter into the model that it was trained on (PEFT: merge_and_unload,"
    " save_pretrained) and give that as the expert"
)


class AdapterCheckpoint(Checkpoint):
    """An expert given as a LoRA adapter: the base's weights plus the products of the factors.

    Weights are computed block by block when they are read. Of several adapters in the folder,
    `default` is used: the one of text tokens (DAMC).
    """

    def __init__(self, uri: str, *, owner: str, base: Checkpoint) -> None:
        """Open the adapter at `uri`, made for `base`. Raises CheckpointError."""
        self.uri, self.owner = uri, owner
        self.folder = AdapterFolder(uri, owner=owner)
        self._store = self.folder.checkpoint._store
        self._base = base
        self._placer = ModulePlacer(base)
        self.config = base.config

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """The base's tensors with adapted weights, and all other tensors of the adapter."""
        adapter = self.folder.default_adapter
        weights = dict(self._base.tensors)
        # A Linear that is adapted and saved as well (`base_layer`) is adapted as saved.
        weights |= self._placer.place_others(self.folder)
        adapted: set[str] = set()
        unplaced: list[str] = []
        parameter_pairs: list[AdapterPair] = []
        pairs = self.folder.pairs_of(adapter)
        for pair in pairs:
            name = self._placer.find_weight(pair.module)
            if name is None and self.folder.target_parameters(adapter):
                parameter_pairs.append(pair)
            elif name is None:
                unplaced.append(pair.module)
            else:
                self._check_once(name, pair.module, adapted)
                weights[name] = self._adapt(name, pair, weights[name])
        for placed in place_parameters(self.folder, parameter_pairs, self._base):
            if placed.weights is None:
                unplaced.append(placed.pair.module)
                continue
            for name, form in placed.weights.items():
                self._check_once(name, placed.pair.module, adapted)
                weights[name] = form(weights[name])
        self._refuse_unplaced(unplaced, num_pairs=len(pairs))
        self._replace_rows(adapter, weights)
        where = f"{self.owner}: {self.uri}"
        return dict(sorted(drop_tied_head(weights, self.config, where=where).items()))

    def _check_once(self, name: str, module: str, adapted: set[str]) -> None:
        """Raise CheckpointError where a second adapter fits a weight; remember the first."""
        if name in adapted:
            raise CheckpointError(
                f"{self.owner}: {self.uri}: two adapters fit {name}, the second is of {module}."
                " Give each its own file"
            )
        adapted.add(name)

    def _refuse_unplaced(self, modules: list[str], *, num_pairs: int) -> None:
        """Raise CheckpointError where adapters fit no Linear of the base: nothing is left out."""
        if not modules:
            return
        if len(modules) == num_pairs:
            raise CheckpointError(
                f"{self.owner}: {self.uri}: no adapter fits a Linear layer of the base; the first"
                f" is for {modules[0]}. Was it trained on this base?"
            )
        raise CheckpointError(
            f"{self.owner}: {self.uri}: {len(modules)} of {num_pairs} adapters fit no Linear of the"
            f" base: {describe_names(modules)}. {REMEDY}"
        )

    def _adapt(self, name: str, pair: AdapterPair, weight: TensorSource) -> LowRankSource:
        """Return the source of a module's weight with an adapter. Raises ShapeMismatch."""
        source = make_low_rank(weight, pair, scale=self.folder.scale_of(pair))
        if weight.spec.shape != adapted_shape(pair):
            raise ShapeMismatch(
                f"{name}: {self.owner} has an adapter for {adapted_shape(pair)}, the base has"
                f" {weight.spec.shape}. Was it trained on this base?"
            )
        if pair.magnitude is not None and pair.magnitude.spec.num_entries != weight.spec.shape[0]:
            raise ShapeMismatch(
                f"{name}: {self.owner} has a lora_magnitude_vector of"
                f" {pair.magnitude.spec.shape}, the base has {weight.spec.shape}: one norm per row"
                " is needed. Was it trained on this base?"
            )
        return source

    def _replace_rows(self, adapter: str, weights: dict[str, TensorSource]) -> None:
        """Put trained token rows in the place of the base's. Raises CheckpointError."""
        for rows in self.folder.token_rows:
            if rows.adapter != adapter:
                continue
            name = self._placer.find_weight(rows.module)
            if name is None:
                raise CheckpointError(
                    f"{self.owner}: {self.uri}: the base has no {rows.module}, whose token rows the"
                    f" adapter trained. {REMEDY}"
                )
            weights[name] = self._replace(name, rows, weights[name])

    def _replace(self, name: str, rows: TokenRows, weight: TensorSource) -> ReplacedRowsSource:
        shape = weight.spec.shape
        if len(shape) != 2 or rows.rows.spec.shape[1] != shape[1] or max(rows.tokens) >= shape[0]:
            raise ShapeMismatch(
                f"{name}: {self.owner} trained rows of {rows.rows.spec.shape} up to token"
                f" {max(rows.tokens)}, the base has {shape}. Was it trained on this base?"
            )
        return ReplacedRowsSource(
            self.uri,
            rows.rows.file,
            make_formed_spec(weight.spec),
            base=weight,
            rows=rows.rows,
            indices=rows.tokens,
        )

    @property
    @override
    def parts(self) -> tuple[Checkpoint, ...]:
        """The base's parts, and the adapter."""
        return (*self._base.parts, self)

    @property
    @override
    def identity(self) -> dict[str, str]:
        """By file of the adapter, a text that changes when the file is replaced; never cached."""
        return self.folder.checkpoint.identity

    @override
    def read_small_files(self) -> dict[str, bytes]:
        """Return the small files of the base, replaced by the adapter's of the same name.

        The adapter's config.json becomes adapter_config.json.
        """
        files = self.folder.checkpoint.read_small_files()
        if "config.json" in files:
            files.setdefault(CONFIG_FILE, files.pop("config.json"))
            files.pop("config.json", None)
        return self._base.read_small_files() | files

    def read_small_file(self, name: str) -> bytes | None:
        """See Checkpoint: the adapter's file, else the base's."""
        data = self.folder.checkpoint.read_small_file(name)
        return self._base.read_small_file(name) if data is None else data


def adapted_shape(pair: AdapterPair) -> tuple[int, ...]:
    """Return the shape of the weight that a pair of factors adapts."""
    rows, columns = pair.b.spec.shape[0], pair.a.spec.shape[1:]
    return (*columns, rows) if pair.is_embedding else (rows, *columns)


def make_low_rank(base: TensorSource, pair: AdapterPair, *, scale: float) -> LowRankSource:
    """Return the source of a module's weight with an adapter."""
    return LowRankSource(
        pair.a.uri,
        pair.a.file,
        make_formed_spec(base.spec),
        base=base,
        a=pair.a,
        b=pair.b,
        scale=scale,
        magnitude=pair.magnitude,
        is_transposed=pair.is_embedding,
    )


def open_expert(uri: str, *, owner: str, base: Checkpoint) -> Checkpoint:
    """Return the expert at `uri`: a whole checkpoint, or a LoRA adapter of the base.

    Raises:
        CheckpointError: the folder cannot be read as either.
    """
    try:
        store = open_readable_store(uri)
    except (NotFound, StoreError):
        return Checkpoint(uri, owner=owner)
    if is_adapter(store):
        return AdapterCheckpoint(uri, owner=owner, base=base)
    return Checkpoint(uri, owner=owner)
