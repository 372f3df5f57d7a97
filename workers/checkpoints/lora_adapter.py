"""LoRA adapter folders of PEFT and of Model Composition: names, byte ranges and scales.

A folder holds one or several named adapters (DAMC: `default` for text tokens, one for the tokens of
the modality), in one file or, as PEFT saves them, in one subfolder each.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, NotFound, ShapeMismatch, StoreError
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.expert_only import describe_names
from mmerge.workers.checkpoints.lora_variants import refuse_variants
from mmerge.workers.checkpoints.module_patterns import ModulePatterns
from mmerge.workers.checkpoints.sources import LowRankSource, TensorSource
from mmerge.workers.checkpoints.tied_head import drop_tied_head
from mmerge.workers.checkpoints.weight_files import WeightFiles, has_weight_files, read_specs

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OFFICIAL_FILES = ("mm_projector.bin", "non_lora_trainables.bin")
DEFAULT_ADAPTER = "default"
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
"""What PEFT puts into the names of tensors that it saves whole."""
_UNREAD_PARTS = ("lora_", "vera_", "hada_", "trainable_tokens", "token_adapter")
"""Parts of names that only tensors of adapters have."""


@dataclass(frozen=True)
class AdapterPair:
    """Both factors of one adapter in one Linear layer; the task vector is scale·B·A."""

    module: str
    """Path of the Linear layer in the adapter's files."""
    adapter: str
    a: TensorSource
    """[rank, in]."""
    b: TensorSource
    """[out, rank]."""
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.spec.shape[0]


def is_adapter(store: ReadableStore) -> bool:
    """Return whether a folder holds adapters rather than a model."""
    if has_weight_files(store):
        return False
    return any(store.exists(file) for file in (*WEIGHT_FILES, CONFIG_FILE, *OFFICIAL_FILES))


class AdapterFolder:
    """One folder of adapters: its configuration and the headers of its files."""

    def __init__(self, uri: str, *, owner: str) -> None:
        """Open the folder at `uri`; `owner` ("expert 'image'") begins every error. Raises
        CheckpointError.
        """
        self.uri, self.owner = uri, owner
        self.checkpoint = _AdapterFiles(uri, owner=owner)
        self._patterns = ModulePatterns(where=f"{owner}: {uri}")

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by stored name; names from subfolders include their adapter's name."""
        return self.checkpoint.tensors

    @cached_property
    def pairs(self) -> tuple[AdapterPair, ...]:
        """Every adapter in every Linear layer.

        Raises:
            CheckpointError, ShapeMismatch: a factor is missing or does not fit the other.
        """
        factors: dict[tuple[str, str], dict[str, TensorSource]] = {}
        for name, source in self.tensors.items():
            match = _FACTOR.match(_strip(name))
            if match:
                key = (match["module"], match["adapter"] or DEFAULT_ADAPTER)
                factors.setdefault(key, {})[match["factor"]] = source
            elif any(part in name for part in _UNREAD_PARTS):
                raise CheckpointError(
                    f"{self.owner}: {self.uri}: {name} is no LoRA factor of a Linear. Merge that"
                    " adapter into its weights first"
                )
        return tuple(
            self._make_pair(module, adapter, sources)
            for (module, adapter), sources in sorted(factors.items())
        )

    @cached_property
    def others(self) -> dict[str, TensorSource]:
        """All tensors that are no LoRA factors, by stripped name.

        These are connectors, learned prefix tokens and tensors saved whole.
        """
        return {
            _WRAPPERS.sub("", _strip(name)): source
            for name, source in self.tensors.items()
            if not _FACTOR.match(_strip(name))
        }

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, sorted."""
        return tuple(sorted({pair.adapter for pair in self.pairs}))

    def pairs_of(self, adapter: str) -> tuple[AdapterPair, ...]:
        """Return the pairs of one adapter. Raises CheckpointError if there is none of that name."""
        pairs = tuple(pair for pair in self.pairs if pair.adapter == adapter)
        if not pairs:
            raise CheckpointError(
                f"{self.owner}: {self.uri} has no adapter {adapter!r}; it has"
                f" {', '.join(self.adapters) or 'none'}"
            )
        return pairs

    def _make_pair(
        self, module: str, adapter: str, sources: dict[str, TensorSource]
    ) -> AdapterPair:
        where = f"{self.owner}: {self.uri}: {module}: adapter {adapter!r}"
        if set(sources) != {"A", "B"}:
            raise CheckpointError(
                f"{where} has only lora_{next(iter(sources))}. Fetch the adapter again"
            )
        a, b = sources["A"], sources["B"]
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2 or a.spec.shape[0] != b.spec.shape[1]:
            raise ShapeMismatch(
                f"{where}: lora_A has {a.spec.shape} and lora_B {b.spec.shape}; they must be (rank,"
                " in) and (out, rank)"
            )
        return AdapterPair(
            module, adapter, a, b, self._scale(module, adapter, rank=a.spec.shape[0], where=where)
        )

    def _scale(self, module: str, adapter: str, *, rank: int, where: str) -> float:
        config = self.checkpoint.configs.get(adapter, self.checkpoint.config)
        alpha = self._patterns.find(
            config, "alpha_pattern", module=module, default=config.get("lora_alpha")
        )
        expected = self._patterns.find(
            config, "rank_pattern", module=module, default=config.get("r", config.get("lora_r"))
        )
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= sys.float_info.max:
            raise CheckpointError(
                f"{where}: the configuration has no lora_alpha that is a number ({alpha!r}), so the"
                f" scale alpha/rank is unknown. Set it in {CONFIG_FILE}"
            )
        if expected is not None and expected != rank:
            raise CheckpointError(
                f"{where}: the configuration says rank {expected}, the factors have {rank}. Fetch"
                " the adapter again"
            )
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class _AdapterFiles(Checkpoint):
    """The files of an adapter folder, read like those of a checkpoint."""

    def __init__(self, uri: str, *, owner: str) -> None:
        self._store: ReadableStore
        self.uri, self.owner = uri, owner
        try:
            self._store = open_readable_store(uri)
        except StoreError as error:
            raise CheckpointError(f"{owner}: {Exception.__str__(error)}") from error
        file = CONFIG_FILE if self._store.exists(CONFIG_FILE) else "config.json"
        self._config_file = file
        self.config = self._read_json(
            file, missing=f"an adapter has {CONFIG_FILE}, an official one config.json"
        )
        # Official folders may have only the model's config.json, whose `use_cache` is no variant.
        refuse_variants(
            self.config, where=f"{owner}: {uri}/{file}", is_peft_config=file == CONFIG_FILE
        )

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Configurations in subfolders, by adapter."""
        configs: dict[str, dict[str, Any]] = {}
        for file in self._subfolders:
            folder = file.split("/", 1)[0]
            name = f"{folder}/{CONFIG_FILE}"
            if self._store.exists(name):
                configs[folder] = self._read_json(name, missing="")
                refuse_variants(configs[folder], where=f"{self.owner}: {self.uri}/{name}")
        return configs

    @override
    def _weight_files(self) -> WeightFiles:
        files = [file for file in WEIGHT_FILES if self._store.exists(file)][:1]
        files += [file for file in OFFICIAL_FILES if self._store.exists(file)]
        files += self._subfolders
        if not files:
            raise CheckpointError(
                f"{self.owner}: {self.uri} has neither {' nor '.join(WEIGHT_FILES)}. Fetch the"
                " adapter again"
            )
        return dict.fromkeys(files)

    @cached_property
    def _subfolders(self) -> list[str]:
        """Weight files of adapters that PEFT saved in subfolders named after them."""
        keys = sorted(
            key
            for key in self._store.list()
            if key.count("/") == 1 and key.rsplit("/", 1)[1] in WEIGHT_FILES
        )
        chosen: dict[str, str] = {}
        for key in keys:
            folder = key.split("/", 1)[0]
            if re.fullmatch(r"checkpoint-[0-9]+", folder):
                continue  # a trainer's earlier state, no adapter of that name
            if folder not in chosen or key.endswith(".safetensors"):
                chosen[folder] = key
        return list(chosen.values())

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        sources: dict[str, TensorSource] = {}
        for file in self._weight_files():
            folder = file.split("/", 1)[0] if "/" in file else ""
            where = f"{self.owner}: {self.uri}/{file}"
            for name, spec in read_specs(self._store, file, where=where).items():
                full_name = _insert_adapter(name, folder) if folder else name
                sources.setdefault(full_name, TensorSource(self.uri, file, spec))
        return dict(sorted(sources.items()))


def _insert_adapter(name: str, adapter: str) -> str:
    """Return the name of a factor with its adapter's name, as PEFT writes several in one file."""
    match = _FACTOR.match(name)
    if match is None:
        return f"{adapter}.{name}"
    return f"{match['module']}.lora_{match['factor']}.{adapter}.weight"


def _strip(name: str) -> str:
    """Return a name without the prefix of PEFT."""
    return name.removeprefix("base_model.model.")


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
        self.config = base.config

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """The base's tensors with adapted weights, and all other tensors of the adapter."""
        base_tensors = self._base.tensors
        replaced: dict[str, TensorSource] = {}
        names = self.folder.adapters
        saved_whole = place_others(self.folder, self._base)
        unplaced: list[str] = []
        pairs = self.folder.pairs_of(names[0] if len(names) == 1 else DEFAULT_ADAPTER)
        for pair in pairs:
            name = find_weight(pair.module, self._base)
            if name is None:
                unplaced.append(pair.module)
                continue
            if name in replaced:
                raise CheckpointError(
                    f"{self.owner}: {self.uri}: two adapters fit {name}, the second is of"
                    f" {pair.module}. Give each its own file"
                )
            # A Linear that is adapted and saved as well (`base_layer`) is adapted as saved.
            replaced[name] = self._make_source(
                name, pair, saved_whole.pop(name, base_tensors[name])
            )
        self._refuse_unplaced(unplaced, num_pairs=len(pairs))
        where = f"{self.owner}: {self.uri}"
        tensors = drop_tied_head(base_tensors | saved_whole | replaced, self.config, where=where)
        return dict(sorted(tensors.items()))

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
            f" base: {describe_names(modules)}. Merge the adapter into the model that it was"
            " trained on (PEFT: merge_and_unload, save_pretrained) and give that as the expert"
        )

    def _make_source(self, name: str, pair: AdapterPair, base: TensorSource) -> LowRankSource:
        shape = (pair.b.spec.shape[0], pair.a.spec.shape[1])
        if base.spec.shape != shape:
            raise ShapeMismatch(
                f"{name}: {self.owner} has an adapter for {shape}, the base has {base.spec.shape}."
                " Was it trained on this base?"
            )
        return make_low_rank(base, pair)

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


def find_weight(module: str, base: Checkpoint) -> str | None:
    """Return the base's weight that an adapter's module is, None where the base has none."""
    return base.family.find_adapted_weight(module, base.tensors, prefix=base.language_prefix)


def place_others(folder: AdapterFolder, base: Checkpoint) -> dict[str, TensorSource]:
    """Return what an adapter saved whole, under the base's names where the base has the module."""
    placed = {}
    for name, source in folder.others.items():
        module, _, last = name.rpartition(".")
        weight = find_weight(module, base) if module else None
        placed[f"{weight.removesuffix('weight')}{last}" if weight else name] = source
    return placed


def make_low_rank(base: TensorSource, pair: AdapterPair) -> LowRankSource:
    """Return the source of a Linear layer's weights with an adapter."""
    num_bytes = 4 * base.spec.num_entries
    spec = type(base.spec)(base.spec.name, "F32", base.spec.shape, 0, num_bytes)
    return LowRankSource(
        pair.a.uri, pair.a.file, spec, base=base, a=pair.a, b=pair.b, scale=pair.scale
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
