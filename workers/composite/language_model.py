"""Load the language model of a composite: read items, scatter them, fill a meta-device model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from mmerge.manifests.errors import REPAIR, CheckpointError, ManifestError
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.composite.loaded import LoadedItems
from mmerge.workers.composite.meta_model import make_meta_model, set_parameter
from mmerge.workers.composite.model_parallel import apply_tensor_parallel, place_layers
from mmerge.workers.composite.placement import Placement, Stage
from mmerge.workers.composite.prefetch import Prefetcher
from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.composite.routed_linear import (
    Policy,
    RoutedBias,
    RoutedLinear,
    RoutedWeights,
)
from mmerge.workers.composite.routed_lora import route_adapters
from mmerge.workers.composite.routing import Routing
from mmerge.workers.composite.shard_exchange import assign_ranks, scatter_item
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.composite.weight_items import Item, ItemReader
from mmerge.workers.modalities.expert_model import make_model
from mmerge.workers.reconstruction.language_reader import LanguageReader

Tensors = Prefetcher[dict[str, torch.Tensor]]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
"""Their weights have three dimensions and more, and mix neighbouring tokens or pixels."""


@dataclass(frozen=True)
class LoadRequest:
    """Arguments of one load, checked."""

    reader: LanguageReader
    expert: str | None
    device: torch.device
    """Of this process, where the placement names none."""
    dtype: torch.dtype
    policy: Policy
    placement: Placement | None
    group: ProcessGroup
    on_bytes: Callable[[int, int], None]
    is_compared: bool = True
    """Whether a small prompt is compared with the experts' own classes."""
    reuse: LoadedItems | None = None
    """Of a composite on the same single device."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The devices of a model placed by layers in this process; none otherwise."""
        if self.placement is None or self.placement.num_ranks > 1:
            return ()
        return self.placement.stages

    @property
    def devices(self) -> list[torch.device]:
        """The devices of this process: one, or one per stage."""
        return [torch.device(stage.device) for stage in self.stages] or [self.device]

    @property
    def can_share(self) -> bool:
        """Whether this process has the whole model, on one device."""
        return self.group.num_ranks == 1 and not self.stages

    @property
    def owner(self) -> str:
        """The model whose configuration is loaded, for messages."""
        return f"expert {self.expert!r}" if self.expert else "base"


class LanguageModelLoader:
    """Loads the language model of one composite.

    Call order: `first_items` while nothing is known of the model yet; `make_model`; `fill`, which
    consumes the prefetched tensors; `connect`.
    """

    def __init__(self, request: LoadRequest, *, routing: Routing, loads: Sequence[int]) -> None:
        """Prepare; `loads` are the bytes that each rank reads for encoders."""
        self.request, self.routing, self.loads = request, routing, loads
        self.reader, self.group = request.reader, request.group
        self.family = request.reader.family
        self.item_reader = ItemReader(
            request.reader, expert=request.expert, dtype=request.dtype, policy=request.policy
        )
        self.loaded = LoadedItems(request.device)
        self.items: list[Item] = []
        self.item_ranks: dict[str, int] = {}
        self.plan: TensorParallelPlan

    def read(self, item: Item) -> dict[str, torch.Tensor]:
        """Return the fields of an item: those of another composite where it has an equal one."""
        reuse = self.request.reuse
        fields = None if reuse is None else reuse.find(item, reader=self.item_reader)
        return self.item_reader.read(item) if fields is None else fields

    def first_items(self) -> list[Item]:
        """Return the items of embedding and head, which are read while the model is made.

        None on several ranks: which rank reads what is not known before the model is.
        """
        if self.group.num_ranks > 1:
            return []
        names = itertools.takewhile(lambda name: layer_of(name) is None, self.reader.llm_names())
        return [self.item_reader.make_item(name) for name in names]

    def make_model(self, config: Any, architecture: str, *, tensors: Tensors) -> Any:
        """Return the language model on the meta device, and queue its tensors in `tensors`.

        A model whose tensors transformers converts comes back loaded; `fill` and `connect` then do
        nothing. `tensors` has the `first_items` already.
        """
        text = config.get_text_config()
        names = self.reader.llm_names()
        embedding = self.family.find_embedding(names)
        if embedding is None:
            raise ManifestError(
                f"{self.reader.uri}: the build has no tensor …{self.family.embedding}. It is"
                f" damaged. {REPAIR}"
            )
        text.vocab_size = self.item_reader.shape(embedding)[0]
        text.architectures = [architecture]
        text.tie_word_embeddings = bool(
            getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
        )
        model = make_meta_model(text, dtype=self.request.dtype, owner=self.request.owner)
        head = self.item_reader.make_expert_head()
        if head:
            names = [*names, head.name]
        parameters = {name for name, _ in model.named_parameters()}
        if text.tie_word_embeddings and self.family.head not in names:
            parameters.discard(self.family.parameter_name(self.family.head))
        num_first = len(self.first_items())
        if parameters != {self.family.parameter_name(name) for name in names}:
            self._check_convertible(text, parameters)
            return self._load_converted(text, tensors, num_first=num_first)
        self.plan = TensorParallelPlan.from_config(
            text, family=self.family, num_ranks=self.group.num_ranks
        )
        self.items = self._make_items(model, names, head)
        self.item_ranks = self._assign_items()
        tensors.add(self._local_items()[num_first:])
        return model

    def _make_items(self, model: nn.Module, names: Sequence[str], head: Item | None) -> list[Item]:
        items = []
        for name in names:
            if head is not None and name == head.name:
                items.append(head)
                continue
            item = self.item_reader.make_item(name)
            module = model.get_submodule(self.family.parameter_name(name).rpartition(".")[0])
            if item.kind != "plain" and not isinstance(module, nn.Linear):
                raise CheckpointError(
                    f"{name}: model family {self.family.name!r} takes it for a Linear layer, the"
                    f" model of transformers {transformers.__version__} has a"
                    f" {type(module).__name__} there. Load one expert (retention)"
                )
            self._check_routable(item, module)
            items.append(item)
        # A routed bias is put into the RoutedLinear that its weight creates, so it comes later.
        return sorted(items, key=lambda item: item.kind == "bias")

    def _check_routable(self, item: Item, module: nn.Module) -> None:
        """Refuse fused experts of a mixture in expansion: tokens would share the text's weights."""
        is_routed = self.reader.manifest.kind == "masks" and not self.request.expert
        if not is_routed or len(item.fields[0].shape) < 3 or isinstance(module, _CONVOLUTIONS):
            return
        raise CheckpointError(
            f"{self.request.owner}: {item.name} holds the fused experts of a mixture, which are not"
            " multiplied token by token with the weights of each modality. Such a model loads as"
            " one expert (mode='retention', expert=NAME) or as a plain build (method 'ties')"
        )

    def _assign_items(self) -> dict[str, int]:
        """Return the rank that reads each item."""
        sizes = [item.num_bytes for item in self.items]
        owners = assign_ranks(sizes, num_ranks=self.group.num_ranks, loads=self.loads)
        return {item.name: rank for item, rank in zip(self.items, owners, strict=True)}

    def _local_items(self) -> list[Item]:
        return [item for item in self.items if self.item_ranks[item.name] == self.group.rank]

    def fill(self, model: nn.Module, tensors: Iterator[dict[str, torch.Tensor]]) -> None:
        """Put every item into the model: all ranks take part in each, one has read it."""
        total, num_bytes = sum(item.num_bytes for item in self._local_items()), 0
        for item in self.items:
            owner = self.item_ranks[item.name]
            fields = scatter_item(item, tensors, group=self.group, owner=owner, plan=self.plan)
            device = self._device_of(item.name)
            placed = {name: value.to(device) for name, value in fields.items()}
            self._place(model, item, placed)
            if self.request.can_share:
                self.loaded.keep(item, placed, reader=self.item_reader)
            if owner == self.group.rank:
                num_bytes += item.num_bytes
                self.request.on_bytes(num_bytes, total)

    def _place(self, model: nn.Module, item: Item, fields: dict[str, torch.Tensor]) -> None:
        if item.kind == "plain":
            name = self.family.parameter_name(item.name)
            set_parameter(model, name, fields["value"], shape=item.fields[0].shape)
            return
        path = item.name.rpartition(".")[0]
        if item.kind == "bias":
            linear = model.get_submodule(path)
            assert isinstance(linear, RoutedLinear)
            linear.bias = RoutedBias(fields["text"], list(fields["experts"]))
            return
        factors, divisor = RoutedWeights.make_factors(
            [self.reader.rescaler(name) for name in self.reader.expert_names]
        )
        weights = RoutedWeights(
            fields["text"],
            fields.get("delta"),
            fields.get("masks"),
            fields.get("modalities"),
            factors,
            divisor,
        )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, RoutedLinear(self.routing, weights))

    def _device_of(self, name: str) -> torch.device:
        for stage in self.request.stages:
            if stage.holds(name):
                return torch.device(stage.device)
        return self.request.devices[0]

    def connect(self, model: Any) -> None:
        """Tie weights, add adapters, and connect the parts of a filled model."""
        if not self.items:
            return
        model.tie_weights()
        if self.reader.manifest.kind == "adapters":
            route_adapters(
                model,
                self.reader,
                self.routing,
                expert=self.request.expert,
                plan=self.plan,
                rank=self.group.rank,
            )
        apply_tensor_parallel(model, self.group, self.plan)
        place_layers(model, self.request.stages, family=self.family)
        if not self.request.stages:
            model.to(self.request.devices[0])

    # Models whose tensors transformers renames or fuses (mixtures of experts).

    def _check_convertible(self, text: Any, parameters: set[str]) -> None:
        """Raise CheckpointError unless the model can be loaded whole and without routing."""
        is_whole = self.group.num_ranks == 1 and not self.request.stages
        if is_whole and (self.request.expert or self.reader.manifest.kind != "masks"):
            return
        stored = set(self.reader.llm_names())
        first = sorted(parameters ^ stored)[0]
        side = "the model" if first in stored else "the build"
        raise CheckpointError(
            f"{self.request.owner}: its tensors do not fit {text.architectures[0]} of transformers"
            f" {transformers.__version__}: {first}: {side} has no tensor of that name. Such a model"
            " loads whole, as a plain build or one expert (retention)"
        )

    def _load_converted(self, text: Any, tensors: Tensors, *, num_first: int) -> Any:
        """Return the model, loaded by transformers from all tensors at once."""
        items = [self.item_reader.make_item(name) for name in self.reader.llm_names()]
        tensors.add(items[num_first:])
        state: dict[str, torch.Tensor] = {}
        total, num_bytes = sum(item.num_bytes for item in items), 0
        for item, fields in zip(items, tensors, strict=True):
            state[item.name] = fields["value"]
            num_bytes += item.num_bytes
            self.request.on_bytes(num_bytes, total)
        is_tied = text.tie_word_embeddings
        model = make_model(
            text,
            state,
            dtype=self.request.dtype,
            owner=self.request.owner,
            may_lack=lambda key: is_tied and self.family.is_head(self.family.stored_name(key)),
        )
        return model.to(self.request.devices[0])
