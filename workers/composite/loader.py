"""Load a composite from its store onto its devices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from torch import nn

from mmerge.manifests.errors import CheckpointError, ManifestError, PlacementError
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.composite.load_adapters import route_adapters
from mmerge.workers.composite.meta_model import find_text_class, make_skeleton, set_parameter
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.model_parallel import join_ranks, spread_layers
from mmerge.workers.composite.placement import Placement
from mmerge.workers.composite.process_group import Ranks, check_device, in_torchrun, open_ranks
from mmerge.workers.composite.routed_linear import (
    Policy,
    RoutedBias,
    RoutedLinear,
    RoutedWeights,
    Routing,
)
from mmerge.workers.composite.tensor_parallel import Division
from mmerge.workers.composite.weight_items import (
    SHARED_WINDOW_BYTES,
    WINDOW_BYTES,
    Fetcher,
    Item,
    ReadAhead,
    deliver,
    read_ahead,
    read_threads,
    share_out,
)
from mmerge.workers.modalities.encoders import Encoder, RankEncoder, load_encoder
from mmerge.workers.modalities.processor_encoder import load_tokenizer, make_config, make_model
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_weights import load_kernel
from mmerge.workers.runtime.host_memory import (
    SharedPages,
    empty_host,
    resident_bytes,
    returned_at_once,
)

Mode = Literal["expansion", "retention"]
Ahead = ReadAhead[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class LoadReport:
    """What one rank read from the store, how long it took to load, and how much memory its process
    had.
    """

    rank: int
    bytes_read: int
    seconds: float
    start_bytes: int = 0
    """Resident memory of the process before the first weight was read (Python, torch, transformers,
    compiled code); 0 where the system does not say.
    """
    peak_bytes: int = 0
    """Most that was resident until it was loaded (VmHWM)."""


def load_composite(
    uri: str,
    *,
    mode: Mode = "expansion",
    expert: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    policy: Policy = "packed",
    placement: Placement | None = None,
    ranks: Ranks | None = None,
    on_bytes: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> Composite:
    """Return the composite at `uri`, ready for prompts.

    Args:
        uri: STORE, STORE#NAME, STORE#NAME@NUMBER or STORE#DIGEST.
        mode: `expansion` routes each token through its modality's weights; `retention` rebuilds one
            expert.
        expert: which one, in retention mode.
        device: where everything is loaded, or this rank's part of it.
        dtype: of the loaded weights; the build's if absent.
        policy: what is kept of a build of masks, see `workers.routing.Policy`; no effect on others.
        placement: from `plan_placement`: over layers in this process, or over the ranks that
            torchrun started.
        ranks: the processes that hold the composite together, from `open_ranks`; by the placement
            if absent.
        on_bytes: told of stored bytes that this rank read, and of how many it reads in all.

    Raises:
        ManifestError, StoreError: the build is missing or damaged, or has no such expert.
        CheckpointError: transformers does not know the models.
        PlacementError: it cannot be divided as asked, or there is no such device.
        RankLost: another rank ended.
    """
    if mode not in get_args(Mode) or policy not in get_args(Policy):
        raise ManifestError(
            f"{uri}: expected a mode of {get_args(Mode)} and a policy of {get_args(Policy)}, got"
            f" {mode!r} and {policy!r}"
        )
    for name in sorted(
        {device, *(stage.device for stage in placement.stages if placement.num_ranks == 1)}
        if placement
        else {device}
    ):
        check_device(name)
    reader = BuildReader(uri)
    if mode == "retention":
        if expert is None:
            raise ManifestError(
                f"{uri}: retention mode rebuilds one expert: name one of"
                f" {', '.join(reader.expert_names)}"
            )
        reader.manifest.to_expert(expert)
    elif expert is not None:
        raise ManifestError(
            f"{uri}: 'expert' has no effect in expansion mode; use mode='retention', or leave"
            " it out"
        )
    ranks = _open_ranks(placement, device, given=ranks)
    try:
        with returned_at_once() if ranks.num_ranks > 1 else nullcontext():
            return _Loader(
                reader, expert, device, dtype or reader.dtype, policy, placement, ranks, on_bytes
            ).load()
    except Exception:
        ranks.close(wait=False)  # the others learn at once that this rank is gone
        raise


def _open_ranks(placement: Placement | None, device: str, *, given: Ranks | None) -> Ranks:
    wanted = placement.num_ranks if placement is not None else None
    if given is None:
        if wanted is not None and wanted > 1 and not in_torchrun():
            raise PlacementError(
                f"the placement is for {wanted} ranks, this process is alone: start it with"
                f" 'torchrun --nproc-per-node {wanted}'"
            )
        given = open_ranks(device=device) if wanted is not None and wanted > 1 else Ranks()
    if wanted is not None and wanted != given.num_ranks:
        raise PlacementError(f"the placement is for {wanted} ranks, {given.num_ranks} were started")
    return given


class _Loader:
    def __init__(
        self,
        reader: BuildReader,
        expert: str | None,
        device: str,
        dtype: torch.dtype,
        policy: Policy,
        placement: Placement | None,
        ranks: Ranks,
        on_bytes: Callable[[int, int], None],
    ) -> None:
        self.reader, self.expert, self.dtype, self.ranks, self.placement = (
            reader,
            expert,
            dtype,
            ranks,
            placement,
        )
        self.manifest = reader.manifest
        self.family = reader.family
        stages = placement.stages if placement is not None and placement.num_ranks == 1 else ()
        self.devices = [torch.device(stage.device) for stage in stages] or [torch.device(device)]
        self.stages = stages
        # What is read is kept as it is only where nothing is cut for other ranks, or moved to other
        # devices.
        keeps_all = ranks.num_ranks == 1 and self._is_on_host()
        self.fetcher = Fetcher(
            reader,
            expert=expert,
            dtype=dtype,
            policy=policy,
            empty=SharedPages().empty if keeps_all else empty_host,
        )
        self.routing = Routing()
        self.on_bytes = on_bytes
        self.start_bytes = 0
        names = [expert] if expert else reader.expert_names
        shares = share_out([self._encoder_bytes(name) for name in names], num_ranks=ranks.num_ranks)
        self.encoder_ranks = dict(zip(names, shares, strict=True))
        self.item_ranks: dict[str, int] = {}
        self.division: Division

    def load(self) -> Composite:
        began = time.monotonic()
        owner = f"expert {self.expert!r}" if self.expert else "base"
        files = self._read_files(
            self.manifest.to_expert(self.expert).files if self.expert else self.manifest.base.files
        )
        if "config.json" not in files:
            raise CheckpointError(f"{owner}: the build has no config.json of it")
        config = make_config(files, owner=owner)
        text_class = find_text_class(config.get_text_config(), owner=owner)  # imports it
        self._note_start()
        early = self._early_items() if self.ranks.num_ranks == 1 else []
        with read_ahead(
            early,
            self._read,
            num_threads=read_threads(self.reader.store),
            window_bytes=self._window_bytes(),
        ) as ahead:
            # While threads read the language model, or when it is there already, for want of items:
            model, items = self._make_skeleton(
                config, text_class.__name__, owner, ahead, num_early=len(early)
            )
            own = [item for item in items if self.item_ranks[item.name] == self.ranks.rank]
            ahead.add(own[len(early) :])
            tokenizer = load_tokenizer(files, config=config, owner=owner)
            encoders = {
                name: self._load_encoder(name, model.config.hidden_size, rank)
                for name, rank in self.encoder_ranks.items()
            }
            self._fill(model, items, ahead)
        if items:
            self._connect(model)
        report = LoadReport(
            self.ranks.rank,
            self.reader.bytes_read,
            time.monotonic() - began,
            self.start_bytes,
            resident_bytes("VmHWM"),
        )
        return Composite(
            manifest=self.manifest,
            expert=self.expert,
            language_model=model,
            routing=self.routing,
            tokenizer=tokenizer,
            encoders=encoders,
            ranks=self.ranks,
            load_reports=self.ranks.collect(report),
        )

    def _read_files(self, entries: tuple[FileEntry, ...]) -> dict[str, bytes]:
        return {entry.name: read_file(self.reader.store, entry) for entry in entries}

    def _window_bytes(self) -> int | None:
        """Return how many stored bytes may be read ahead."""
        if self.ranks.num_ranks > 1:
            return SHARED_WINDOW_BYTES
        if self._is_on_host():
            return (
                None  # what is read becomes the model as it is: none of it stands beside the model
            )
        return max(WINDOW_BYTES, self.reader.largest_shard_bytes())

    def _is_on_host(self) -> bool:
        return all(device.type == "cpu" for device in self.devices)

    # The language model.

    def _early_items(self) -> list[Item]:
        """Return what any model of these tensors begins with, embedding and head: they are read
        while its skeleton is made.
        """
        names = itertools.takewhile(lambda name: layer_of(name) is None, self.reader.llm_names())
        return [self.fetcher.make_item(name) for name in names]

    def _note_start(self) -> None:
        """Note the memory of the process before the first weight is read; libraries and compiled
        code are there.
        """
        if self.manifest.kind == "masks":
            load_kernel()
        self.start_bytes = resident_bytes("VmRSS")

    def _make_skeleton(
        self, config: Any, architecture: str, owner: str, ahead: Ahead, *, num_early: int
    ) -> tuple[Any, list[Item]]:
        """Return the language model without weights, and what is to be put into it; with them where
        that is all one step.

        `ahead` has been given the first `num_early` tensors of the language model.
        """
        text = config.get_text_config()
        names = self.reader.llm_names()
        embedding = self.family.find_embedding(names)
        if embedding is None:
            raise ManifestError(
                f"{self.reader.uri}: the build has no tensor …{self.family.embedding}. It is"
                " damaged: run the recipe again"
            )
        text.vocab_size = self.fetcher.shape(embedding)[0]
        text.architectures = [architecture]
        text.tie_word_embeddings = bool(
            getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
        )
        model = make_skeleton(text, dtype=self.dtype, owner=owner)
        if head := self.fetcher.own_head():
            names = [*names, head.name]
        parameters = {name for name, _ in model.named_parameters()}
        if text.tie_word_embeddings and self.family.head not in names:
            parameters.discard(self.family.parameter_name(self.family.head))
        if parameters != {self._parameter_name(name) for name in names}:
            return self._load_converted(text, owner, ahead, num_early=num_early), []
        self.division = Division.of(text, family=self.family, num_ranks=self.ranks.num_ranks)
        items = self._make_items(model, names, head)
        taken = [
            sum(
                self._encoder_bytes(name)
                for name, rank in self.encoder_ranks.items()
                if rank == each
            )
            for each in range(self.ranks.num_ranks)
        ]
        shares = share_out(
            [item.num_bytes for item in items], num_ranks=self.ranks.num_ranks, taken=taken
        )
        self.item_ranks = {item.name: rank for item, rank in zip(items, shares, strict=True)}
        return model, items

    def _connect(self, model: Any) -> None:
        model.tie_weights()
        if self.manifest.kind == "adapters":
            route_adapters(
                model,
                self.reader,
                self.routing,
                expert=self.expert,
                division=self.division,
                rank=self.ranks.rank,
            )
        join_ranks(model, self.ranks, self.division)
        spread_layers(model, self.stages, self.family)
        if not self.stages:
            model.to(self.devices[0])

    def _load_converted(self, text: Any, owner: str, ahead: Ahead, *, num_early: int) -> Any:
        """Load a model whose tensors transformers itself renames or fuses (mixtures of experts):
        whole, and without routing.
        """
        if (
            self.ranks.num_ranks > 1
            or self.stages
            or (self.expert is None and self.manifest.kind == "masks")
        ):
            names = {
                name
                for name, _ in make_skeleton(text, dtype=self.dtype, owner=owner).named_parameters()
            }
            found = set(self.reader.llm_names())
            first = sorted(names ^ found)[0]
            side = (
                "the model has no tensor of that name"
                if first in found
                else "the build has no tensor of that name"
            )
            raise CheckpointError(
                f"{owner}: its tensors do not fit {text.architectures[0]} of transformers"
                f" {transformers.__version__}: {first}: {side}. Such a model loads whole, as a"
                " plain build or one expert (retention)"
            )
        items = [self.fetcher.make_item(name) for name in self.reader.llm_names()]
        ahead.add(items[num_early:])
        state: dict[str, torch.Tensor] = {}
        total, done = sum(item.num_bytes for item in items), 0
        for item, read in zip(items, ahead, strict=True):
            state[item.name] = read["value"]
            done += item.num_bytes
            self.on_bytes(done, total)
        tied = text.tie_word_embeddings
        return make_model(
            text,
            state,
            dtype=self.dtype,
            owner=owner,
            may_lack=lambda key: tied and self.family.is_head(self.family.stored_name(key)),
        ).to(self.devices[0])

    def _make_items(self, model: nn.Module, names: Sequence[str], head: Item | None) -> list[Item]:
        items = []
        for name in names:
            if head is not None and name == head.name:
                items.append(head)
                continue
            item = self.fetcher.make_item(name)
            module = model.get_submodule(self._parameter_name(name).rpartition(".")[0])
            if item.kind != "plain" and not isinstance(module, nn.Linear):
                raise CheckpointError(
                    f"{name}: model family {self.family.name!r} takes it for a Linear layer, the"
                    f" model of transformers {transformers.__version__} has a"
                    f" {type(module).__name__} there. Load one expert (retention)"
                )
            items.append(item)
        # A bias is put into the RoutedLinear that its weight makes.
        return sorted(items, key=lambda item: item.kind == "bias")

    def _fill(
        self, model: nn.Module, items: Sequence[Item], ready: Iterator[dict[str, torch.Tensor]]
    ) -> None:
        total, done = (
            sum(item.num_bytes for item in items if self.item_ranks[item.name] == self.ranks.rank),
            0,
        )
        for item in items:
            owner = self.item_ranks[item.name]
            parts = deliver(item, ready, ranks=self.ranks, owner=owner, division=self.division)
            device = self._device_of(item.name)
            self._place(model, item, {name: part.to(device) for name, part in parts.items()})
            if owner == self.ranks.rank:
                done += item.num_bytes
                self.on_bytes(done, total)

    def _read(self, item: Item) -> dict[str, torch.Tensor]:
        head = self.family.head
        if item.name == head and self.expert and not self.reader.has(head, "base"):
            own = self.manifest.rename(head, expert=self.expert)
            if self.reader.has(own, "carried", self.expert):
                return {"value": self.reader.read(own, "carried", self.expert).to(self.dtype)}
        return self.fetcher.read(item)

    def _place(self, model: nn.Module, item: Item, parts: dict[str, torch.Tensor]) -> None:
        path = item.name.rpartition(".")[0]
        if item.kind == "plain":
            name = self._parameter_name(item.name)
            set_parameter(model, name, parts["value"], shape=item.fields[0].shape)
            return
        module = model.get_submodule(path)
        if item.kind == "bias":
            assert isinstance(module, RoutedLinear)
            module.bias = RoutedBias(parts["text"], list(parts["experts"]))
            return
        factors, divisor = RoutedWeights.factors_of(
            [self.reader.rescaler(name) for name in self.reader.expert_names]
        )
        held = RoutedWeights(
            parts["text"],
            parts.get("delta"),
            parts.get("masks"),
            parts.get("modalities"),
            factors,
            divisor,
        )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, RoutedLinear(self.routing, held))

    def _parameter_name(self, name: str) -> str:
        return self.family.parameter_name(name)

    def _device_of(self, name: str) -> torch.device:
        for stage in self.stages:
            if stage.holds(name):
                return torch.device(stage.device)
        return self.devices[0]

    # Encoders.

    def _encoder_bytes(self, name: str) -> int:
        return sum(
            self.reader.stored_bytes(key, "carried", name)
            for key in self.reader.names("carried", name)
        )

    def _load_encoder(self, name: str, hidden_size: int, rank: int) -> Encoder:
        record = self.manifest.to_expert(name)
        held = None
        if rank == self.ranks.rank:
            held = load_encoder(
                self.reader,
                name,
                files=self._read_files(record.files),
                hidden_size=hidden_size,
                dtype=self.dtype,
                device=self.devices[0],
            )
        if self.ranks.num_ranks == 1:
            assert held is not None
            return held
        return RankEncoder(
            held,
            modality=record.modality,
            ranks=self.ranks,
            rank=rank,
            dtype=self.dtype,
            device=self.devices[0],
        )
