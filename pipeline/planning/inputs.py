"""The open inputs of a plan: base and experts, put together as the recipe says.

Adapters are merged first, then rows are matched by token, then layers are sliced: the order in
which the later steps see whole models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmerge.manifests.errors import CheckpointError, RecipeError
from mmerge.pipeline.planning.config_checks import list_config_warnings
from mmerge.pipeline.planning.layer_stack import OpenSlice, stack_slices
from mmerge.pipeline.planning.tokenizer_files import (
    Files,
    add_tokens,
    copy_tokenizer,
    find_common_template,
    set_chat_template,
)
from mmerge.pipeline.planning.vocabulary_config import TokenIds, change_vocabulary
from mmerge.pipeline.planning.vocabulary_rows import (
    MergedVocabulary,
    TokenizedModel,
    gather_tables,
    number_tokens,
)
from mmerge.pipeline.recipes.inputs import LayerSlice, ModelPlace, TokenOwner, Vocabulary
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.workers.adapters.checkpoint import AdapterCheckpoint, open_expert
from mmerge.workers.adapters.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.derived import Changes, DerivedCheckpoint
from mmerge.workers.methods import find_method


@dataclass(frozen=True)
class Inputs:
    """Base and experts of a plan."""

    base: Checkpoint
    experts: list[Checkpoint]
    warnings: tuple[str, ...] = ()
    """Differences between the models that one of them is put together from."""


def open_inputs(recipe: Recipe) -> Inputs:
    """Return the inputs of a recipe. Only configurations, headers and tokenizers are read.

    Raises:
        CheckpointError: one of them cannot be read, or they cannot be put together so.
        RecipeError: the method cannot work on models that are put together.
    """
    _check_kind(recipe)
    owner = "base" if recipe.has_base else f"expert {recipe.experts[0].name!r}"
    base = _open_place(recipe.base_place, owner=owner, base=None)
    experts = []
    for expert in recipe.experts:
        place = expert.place
        experts.append(_open_place(place, owner=f"expert {expert.name!r}", base=base))
    if not recipe.rearranges_inputs:
        return Inputs(_without_adapter_file(base), experts)
    return _Assembly(recipe, _OpenModels(base, experts)).assemble()


def _check_kind(recipe: Recipe) -> None:
    """Raise RecipeError where a method keeps its experts, and a key is for merged models alone."""
    if find_method(recipe.method).kind == "plain":
        return
    stated = {
        "slices": any(expert.slices for expert in recipe.experts),
        "base_slices": bool(recipe.base_slices),
        "base_lora": recipe.base_adapter is not None,
        "lora": any(expert.adapter for expert in recipe.experts),
        "tokenizer": recipe.vocabulary is not None,
        "chat_template": recipe.chat_template is not None,
        "keep": bool(recipe.keep),
    }
    for key, is_stated in stated.items():
        if is_stated:
            raise RecipeError(
                f"{key}: is for methods that give one merged model; {recipe.method!r} keeps its"
                " experts beside the base. Choose another method, or leave the key out"
            )


def _open_place(place: ModelPlace, *, owner: str, base: Checkpoint | None) -> Checkpoint:
    if place.adapter is None:
        if base is None:
            return Checkpoint(place.uri, owner=owner)
        return open_expert(place.uri, owner=owner, base=base)
    model = Checkpoint(place.uri, owner=owner)
    adapted = open_expert(place.adapter, owner=owner, base=model)
    if not isinstance(adapted, AdapterCheckpoint):
        raise CheckpointError(
            f"{owner}: {place.adapter} is no LoRA adapter but a whole checkpoint. Give it as a"
            " model of its own"
        )
    return adapted


def _without_adapter_file(base: Checkpoint) -> Checkpoint:
    """Return a base with an adapter merged in without the adapter's configuration."""
    if not isinstance(base, AdapterCheckpoint):
        return base
    return DerivedCheckpoint(base, Changes(files={ADAPTER_CONFIG_FILE: None}))


@dataclass
class _OpenModels:
    """Every model that a recipe reads, opened once."""

    base: Checkpoint
    experts: Sequence[Checkpoint]
    by_place: dict[ModelPlace, Checkpoint] = field(default_factory=dict)

    def open(self, place: ModelPlace, *, owner: str) -> Checkpoint:
        """Return the model at a place."""
        if place not in self.by_place:
            self.by_place[place] = _open_place(place, owner=owner, base=self.base)
        return self.by_place[place]


class _Assembly:
    """Puts the inputs of one recipe together."""

    def __init__(self, recipe: Recipe, models: _OpenModels) -> None:
        self._recipe = recipe
        self._models = models
        models.by_place[recipe.base_place] = models.base
        for expert, checkpoint in zip(recipe.experts, models.experts, strict=True):
            models.by_place.setdefault(expert.place, checkpoint)
        self._places = self._list_places()
        self._originals = [self._open(place) for place in self._places]
        """The merged models before tokens are matched."""
        self._files: Files = {}
        self._warnings: list[str] = []

    def assemble(self) -> Inputs:
        """Return base and experts with their rows, layers and tokenizer files."""
        recipe = self._recipe
        if recipe.vocabulary is not None:
            self._match_tokens(recipe.vocabulary)
        self._choose_template()
        base = self._put_together(recipe.base_place, recipe.base_slices, owner=self._base_owner)
        experts = [
            self._put_together(expert.place, expert.slices, owner=f"expert {expert.name!r}")
            for expert in recipe.experts
        ]
        base = DerivedCheckpoint(base, Changes(files={ADAPTER_CONFIG_FILE: None}))
        return Inputs(base, experts, tuple(dict.fromkeys(self._warnings)))

    @property
    def _base_owner(self) -> str:
        recipe = self._recipe
        return "base" if recipe.has_base else f"expert {recipe.experts[0].name!r}"

    def _list_places(self) -> dict[ModelPlace, str]:
        """Return the merged models and their owners, the base or the first one first."""
        recipe = self._recipe
        parts = [(recipe.base_place, recipe.base_slices, self._base_owner)]
        for expert in recipe.experts:
            parts.append((expert.place, expert.slices, f"expert {expert.name!r}"))
        places: dict[ModelPlace, str] = {}
        for place, slices, owner in parts:
            for used in [part.place for part in slices] or [place]:
                places.setdefault(used, owner)
        return places

    def _match_tokens(self, request: Vocabulary) -> None:
        """Give every model the rows of the merged vocabulary, and its tokenizer."""
        places = list(self._places)
        owners = [row.owner for _, row in request.rows]
        if request.fill_from is not None:
            owners.append(request.fill_from)
        for owner in owners:
            place = self._place_of(owner)
            if place is not None and place not in places:
                places.append(place)
        models = [TokenizedModel(self._open(place)) for place in places]
        merged = models[: len(self._places)]
        source = self._find_source(request.source)
        extra = [token for token, _ in request.rows]
        fills = self._find_filling(request, places)
        # A union begins with the tokenizer of the base.
        first = models[fills] if fills is not None else models[0]
        ids = number_tokens([first, *merged], source, extra)
        multiple = request.pad_to_multiple_of
        num_rows = -(-(max(ids.values()) + 1) // multiple) * multiple
        rows = {}
        for token, row in request.rows:
            place = self._place_of(row.owner)
            rows[token] = (row, None if place is None else places.index(place))
        vocabulary = MergedVocabulary(
            ids=ids,
            num_rows=num_rows,
            models=tuple(models),
            num_merged=len(merged),
            fills=fills,
            rows=rows,
        )
        if source is None:
            added = {token: number for token, number in ids.items() if token not in first.ids}
            new = [token for token in added if not any(token in model.ids for model in merged)]
            givers = [model.checkpoint for model in merged]
            self._files = add_tokens(first.checkpoint, added, givers, new_tokens=new)
        else:
            self._files = copy_tokenizer(source.checkpoint)
        token_ids = TokenIds(ids, source)
        for position, place in enumerate(self._places):
            model = models[position]
            tensors = model.checkpoint.tensors | gather_tables(vocabulary, position)
            config, files = change_vocabulary(model, token_ids, num_rows=num_rows)
            changes = Changes(tensors=tensors, config=config, files=files | self._files)
            givers = [item.checkpoint for item in models]
            self._models.by_place[place] = DerivedCheckpoint(
                model.checkpoint, changes, parts=givers
            )

    def _find_filling(self, request: Vocabulary, places: Sequence[ModelPlace]) -> int | None:
        """Return the position of the model whose rows others take; None if there is none."""
        if request.fill_from is None:
            return 0 if self._recipe.has_base else None
        place = self._place_of(request.fill_from)
        return None if place is None else places.index(place)

    def _find_source(self, owner: TokenOwner) -> TokenizedModel | None:
        """Return the model whose tokenizer is taken; None for the union of all."""
        if owner.kind == "union":
            return None
        place = self._place_of(owner)
        assert place is not None
        return TokenizedModel(self._open(place))

    def _place_of(self, owner: TokenOwner) -> ModelPlace | None:
        """Return where a model is whose token is taken; None for a row of zeros."""
        recipe = self._recipe
        if owner.kind == "zero":
            return None
        if owner.kind == "base":
            return next(iter(self._places))
        if owner.kind == "expert":
            expert = next(item for item in recipe.experts if item.name == owner.value)
            return expert.slices[0].place if expert.slices else expert.place
        return ModelPlace(owner.value)

    def _open(self, place: ModelPlace) -> Checkpoint:
        return self._models.open(place, owner=self._places.get(place, "tokenizer"))

    def _choose_template(self) -> None:
        """Add the chat template to the files of the tokenizer."""
        template = self._recipe.chat_template
        if template is None:
            return
        if template == "auto":
            template = find_common_template(self._originals)
        if template is not None:
            files = self._files or copy_tokenizer(self._originals[0])
            self._files = set_chat_template(files, template, where="chat_template")

    def _put_together(
        self, place: ModelPlace, slices: tuple[LayerSlice, ...], *, owner: str
    ) -> Checkpoint:
        """Return one input: a model, or slices of models, with the files of the tokenizer."""
        if slices:
            opened = [self._open(part.place) for part in slices]
            for checkpoint in opened[1:]:
                if checkpoint is not opened[0]:
                    self._warnings += list_config_warnings(opened[0], checkpoint)
            parts = [
                OpenSlice(checkpoint, part.first, part.last)
                for checkpoint, part in zip(opened, slices, strict=True)
            ]
            checkpoint = stack_slices(parts)
        else:
            checkpoint = self._open(place)
        derived = DerivedCheckpoint(checkpoint, Changes(files=self._files))
        derived.owner = owner
        return derived
