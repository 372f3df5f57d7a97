"""A valid recipe: what is merged, how, and where the composite goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmerge.manifests.errors import CheckpointError, StoreError
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.stores.open import pin_uri
from mmerge.pipeline.recipes.inputs import (
    LayerSlice,
    ModelPlace,
    Vocabulary,
    map_place,
    map_slices,
)
from mmerge.pipeline.recipes.parameter_schedule import Schedule, resolve
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Method, MethodParameters, Parameters


@dataclass(frozen=True)
class Expert:
    """One expert of a recipe."""

    name: str
    uri: str
    modality: str
    parameters: Parameters
    placeholder: str | None
    template: str | None
    adapter: str | None = None
    """URI of the LoRA adapter that is merged into the checkpoint at `uri`."""
    slices: tuple[LayerSlice, ...] = ()
    """Its layers in their order; empty where they are those of the checkpoint."""

    @property
    def place(self) -> ModelPlace:
        """Its checkpoint and adapter."""
        return ModelPlace(self.uri, self.adapter)


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. Paths are absolute; the method's parameters are complete with defaults."""

    name: str
    base: str
    """URI of the base; in a recipe without base, of the first expert, which names the tensors."""
    has_base: bool
    experts: tuple[Expert, ...]
    method: str
    parameters: Parameters
    merge: Literal["all", "linear"]
    dtype: str | None
    carry: tuple[str, ...]
    non_finite: Literal["error", "keep"]
    output: str
    template: str | None
    chat_template_from: str | None = None
    """`base`, `none`, or an expert's name."""

    schedules: dict[str, dict[str, Schedule]] = field(default_factory=dict)
    """Parameters that differ between tensors: by expert (empty: of the recipe) and key."""
    base_adapter: str | None = None
    """URI of the LoRA adapter that is merged into the base."""
    base_slices: tuple[LayerSlice, ...] = ()
    """The base's layers in their order; empty where they are those of the checkpoint."""
    keep: tuple[str, ...] = ()
    """Patterns of base tensors that stay the base's."""
    vocabulary: Vocabulary | None = None
    """The tokenizer; None merges rows by their number."""
    chat_template: str | None = None
    """Jinja text, or `auto`."""

    @property
    def base_place(self) -> ModelPlace:
        """The base's checkpoint and adapter."""
        return ModelPlace(self.base, self.base_adapter)

    @property
    def rearranges_inputs(self) -> bool:
        """Whether models are put together or renumbered before they are merged."""
        if self.vocabulary is not None or self.chat_template is not None or self.base_slices:
            return True
        return any(expert.slices for expert in self.experts)

    def parameters_by_tensor(self, names: Sequence[str]) -> dict[str, MethodParameters]:
        """Return the parameters of every tensor, complete with defaults.

        Tensors with equal parameters share one object, so that a plan of thousands of tensors stays
        small.

        Raises:
            RecipeError: the parameters of some tensor do not fit the method.
        """
        method = find_method(self.method)
        layers = [layer for layer in map(layer_of, names) if layer is not None]
        num_layers = max(layers, default=-1) + 1
        distinct: list[MethodParameters] = []
        by_tensor: dict[str, MethodParameters] = {}
        for name in names:
            parameters = self._resolve_for(name, method, num_layers)
            if parameters not in distinct:
                self._check(parameters, method)
                distinct.append(parameters)
            by_tensor[name] = distinct[distinct.index(parameters)]
        return by_tensor

    def _resolve_for(self, tensor_name: str, method: Method, num_layers: int) -> MethodParameters:
        parameters = resolve(
            self.parameters.model_dump(mode="json"),
            self.schedules.get("", {}),
            method.parameters_model,
            name=tensor_name,
            num_layers=num_layers,
        )
        experts = tuple(
            resolve(
                expert.parameters.model_dump(mode="json"),
                self.schedules.get(expert.name, {}),
                method.expert_parameters_model,
                name=tensor_name,
                num_layers=num_layers,
            )
            for expert in self.experts
        )
        return MethodParameters(parameters, experts)

    def _check(self, raw: MethodParameters, method: Method) -> None:
        method.check_recipe(
            method.parameters_model.model_validate(raw.parameters),
            [method.expert_parameters_model.model_validate(item) for item in raw.experts],
            has_base=self.has_base,
        )

    def describe_parameters(self, expert_name: str = "") -> dict[str, Any]:
        """Return the parameters of the recipe, or of one expert, as the manifest stores them.

        Schedules take the place of their numbers.
        """
        parameters = self.parameters
        slices = self.base_slices if self.has_base else ()
        for expert in self.experts:
            if expert.name == expert_name:
                parameters, slices = expert.parameters, expert.slices
        schedules = self.schedules.get(expert_name, {})
        described = parameters.model_dump(mode="json") | {
            key: schedule.to_json() for key, schedule in schedules.items()
        }
        if slices:
            key = "slices" if expert_name else "base_slices"
            described[key] = [[part.first, part.last] for part in slices]
        if self.vocabulary is not None and not expert_name:
            described["tokenizer"] = self.vocabulary.describe()
        return described


def pin_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every hf:// revision replaced by the commit that it names now.

    Raises:
        CheckpointError: the Hub does not know a repository or revision, or cannot be reached.
    """

    def pin_expert(expert: Expert) -> Expert:
        def pin(uri: str) -> str:
            return _pin(uri, f"expert {expert.name!r}")

        place = map_place(expert.place, pin)
        return replace(
            expert, uri=place.uri, adapter=place.adapter, slices=map_slices(expert.slices, pin)
        )

    def pin_base(uri: str) -> str:
        return _pin(uri, "base")

    base = map_place(recipe.base_place, pin_base)
    vocabulary = recipe.vocabulary
    if vocabulary is not None:
        vocabulary = vocabulary.map_uris(lambda uri: _pin(uri, "tokenizer"))
    return replace(
        recipe,
        base=base.uri,
        base_adapter=base.adapter,
        base_slices=map_slices(recipe.base_slices, pin_base),
        experts=tuple(pin_expert(expert) for expert in recipe.experts),
        vocabulary=vocabulary,
    )


def _pin(uri: str, owner: str) -> str:
    try:
        return pin_uri(uri)
    except StoreError as error:
        raise CheckpointError(f"{owner}: {Exception.__str__(error)}") from error
