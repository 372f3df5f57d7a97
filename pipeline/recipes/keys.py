"""The keys of a recipe: those of every recipe, and with those of a method its pydantic model."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, Field, create_model

from mmerge.manifests.format.references import NAME_PATTERN
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Parameters


class SliceKeys(Parameters):
    """Successive layers of a checkpoint, for the layers of a model that is put together of such."""

    layers: tuple[int, int] = Field(description="first and last layer, both included")
    path: str | None = Field(
        None, min_length=1, description="the checkpoint; by default that of the model itself"
    )
    lora: str | None = Field(
        None, min_length=1, description="LoRA adapter that is merged into this checkpoint first"
    )


class TokenRowKeys(Parameters):
    """The row of one token of another checkpoint."""

    model: str = Field(min_length=1, description="'base', an expert's name, or a path or URI")
    token: str | None = Field(None, min_length=1, description="the token there")
    token_id: int | None = Field(None, ge=0, description="its id, in place of 'token'")


class TokenKeys(Parameters):
    """Where the row of one token comes from in models whose tokenizer lacks it."""

    source: TokenRowKeys | str = Field(
        description=(
            "'base', an expert's name, or a path or URI: this token's row there; {model, token} or"
            " {model, token_id}: that of another token; 'zero'"
        ),
    )
    force: bool = Field(False, description="use this row in all models, whatever they have")


class TokenizerKeys(Parameters):
    """The tokenizer of the merged model; rows of embeddings and heads are matched by token."""

    source: str = Field(
        "base",
        min_length=1,
        description=(
            "'base', an expert's name, or a path or URI: that tokenizer; 'union': the base's, and"
            " all tokens that only others have"
        ),
    )
    tokens: dict[str, TokenKeys] = Field(
        default_factory=dict, description="rows of single tokens, by token"
    )
    fill_from: str | None = Field(
        None,
        min_length=1,
        description=(
            "'base', an expert's name, or a path or URI: whose rows models take for other tokens"
            " that they lack; by default the base's"
        ),
    )
    pad_to_multiple_of: int | None = Field(
        None, ge=1, le=1 << 20, description="add rows of zeros up to a multiple of this number"
    )


class RecipeKeys(Parameters):
    """The keys that every recipe may have, whatever its method."""

    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="name of the composite in its store; by default the recipe's file name",
    )
    base: str | None = Field(
        None,
        min_length=1,
        description=(
            "folder or URI of the base LLM (Hugging Face layout, safetensors), relative to the"
            " recipe; optional for some methods"
        ),
    )
    base_lora: str | None = Field(
        None, min_length=1, description="LoRA adapter that is merged into the base first"
    )
    base_slices: list[SliceKeys] | None = Field(
        None,
        min_length=1,
        description=(
            "layers of the base in their order, instead of its own; embeddings are those of the"
            " first slice, last norm and head of the last"
        ),
    )
    output: str = Field(
        min_length=1,
        description="folder or URI of the store to write to, relative to the recipe",
    )
    merge: Literal["all", "linear"] = Field(
        "all",
        description=(
            "merge all shared tensors of the language model, or only its linear projections"
            " (embeddings, norms and head stay the base's)"
        ),
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="dtype of the merged weights; by default the base's"
    )
    carry: list[str] = Field(
        default_factory=list,
        description=(
            "patterns (with *) of base tensors that are not merged but copied from every expert"
        ),
    )
    keep: list[str] = Field(
        default_factory=list,
        description="patterns (with *) of base tensors that are not merged but stay the base's",
    )
    tokenizer: TokenizerKeys | None = Field(
        None,
        description=(
            "tokenizer of the merged model; without it, rows are merged by their number and the"
            " base's tokenizer is kept"
        ),
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description=(
            "chat template of the merged model: Jinja text, 'chatml', or 'auto' for the one that"
            " most of the models have; by default the tokenizer's"
        ),
    )
    non_finite: Literal["error", "keep"] = Field(
        "error", description="what to do about NaN and Inf in an input"
    )
    template: str | None = Field(
        None, description="prompt template; '{media}' and '{text}' mark the places"
    )
    chat_template_from: str | None = Field(
        None,
        description=(
            "whose chat template forms prompts: 'base', 'none', or an expert's name; by default"
            " that of the only expert whose inputs a prompt has, else the base's"
        ),
    )


class ExpertKeys(Parameters):
    """The keys that every expert may have, whatever the method."""

    path: str = Field(
        min_length=1, description="folder or URI of the expert's checkpoint, relative to the recipe"
    )
    lora: str | None = Field(
        None,
        min_length=1,
        description="LoRA adapter that is merged into the checkpoint at 'path' first",
    )
    slices: list[SliceKeys] | None = Field(
        None,
        min_length=1,
        description="layers of the expert in their order, as 'base_slices' of the base",
    )
    modality: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,39}$", description="image, audio, video, point, …"
    )
    placeholder: str | None = Field(
        None,
        description=(
            "text that the expert's processor expands to media tokens; by default found from the"
            " processor"
        ),
    )
    template: str | None = Field(
        None, description="text around one media file in a prompt; '{media}' marks its place"
    )


@cache
def make_recipe_model(method_name: str) -> type[BaseModel]:
    """Return the pydantic model of recipes with this method: the common keys and its own."""
    method = find_method(method_name)
    title = to_title(method_name)
    expert_model = create_model(
        f"{title}Expert", __base__=(ExpertKeys, method.expert_parameters_model)
    )
    experts_type: Any = dict[str, expert_model]
    method_type: Any = Literal[method_name]
    experts_field: Any = Field(
        min_length=1, description="the experts by name, in the order of summation"
    )
    model: type[BaseModel] = create_model(
        f"{title}Recipe",
        __base__=(RecipeKeys, method.parameters_model),
        method=(method_type, Field(description=method.source)),
        experts=(experts_type, experts_field),
    )
    return model


def to_title(method_name: str) -> str:
    """Return the name of a method in the names of its models: TallMasks for tall_masks."""
    return "".join(word.title() for word in method_name.split("_"))
