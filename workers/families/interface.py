"""Interface of a model family: what its tensors are called and how they are split over ranks.

A family is pure data. Who asks it, in the order of a build and a load:

1. `find_family` (registry.py) chooses the family of the base from the names and shapes in its
   headers. The planner calls it through `Checkpoint.family`.
2. The planner finds the language model in each expert's files (`find_prefixes`), the tensors merged
   under `merge: linear` (`is_projection`) and the weights of LoRA adapters (`find_adapted_weight`).
3. Methods and parameter schedules ask what a tensor is (`role_of` in registry.py).
4. `BuildReader.family` chooses the family again from the stored names. Placement and loader ask
   which Linear layers have weights per modality (`is_routed_linear`), how each tensor is split over
   ranks (`rule_of`), and what transformers calls a stored tensor (`parameter_name`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmerge.manifests.errors import PlacementError
from mmerge.manifests.format.tensor_names import split_layer

ProjectionRole = Literal[
    "query",
    "key",
    "value",
    "query_key_value",
    "attention_output",
    "gate",
    "up",
    "gate_up",
    "down",
]
Role = Literal[ProjectionRole, "embedding", "head", "final_norm"]
FusedPart = Literal["heads", "kv_heads", "even"]
Shapes = Mapping[str, Sequence[int]]

_WRAPPERS = (
    "",
    "language_model.",
    "model.language_model.",
    "model.text_model.",
    "text_model.",
    "thinker.",
)
"""Prefixes that multimodal classes put before their language model, as PEFT records them."""


def strip_wrapper(module: str) -> str:
    """Return a module's path below the language model: `layers.0.mlp`, whatever is around it."""
    wrapper = max((item for item in _WRAPPERS if module.startswith(item)), key=len)
    return module[len(wrapper) :].removeprefix("model.")


@dataclass(frozen=True)
class Projection:
    """One Linear layer of a decoder layer."""

    path: str
    """Module path below the layer: `self_attn.q_proj`."""
    role: ProjectionRole
    is_interleaved: bool = False
    """Fused query, key and value: rows are stored as [head, 3, head_dim], not part after part."""


@dataclass(frozen=True)
class ParallelRule:
    """How tensor parallelism splits one tensor (Megatron-LM, arXiv 1909.08053, section 3)."""

    along: Literal["rows", "columns", "vocabulary", "replicated"]
    parts: tuple[FusedPart, ...] = ("even",)
    """Fused parts in the order of their rows. Each is split over the ranks on its own: attention
    heads, key-value heads, or an even share of the rows.
    """


REPLICATED = ParallelRule("replicated")
_ROW_PARTS: Mapping[ProjectionRole, tuple[FusedPart, ...]] = {
    "query": ("heads",),
    "key": ("kv_heads",),
    "value": ("kv_heads",),
    "query_key_value": ("heads", "kv_heads", "kv_heads"),
    "gate": ("even",),
    "up": ("even",),
    "gate_up": ("even", "even"),
}
_BY_COLUMNS: tuple[ProjectionRole, ...] = ("attention_output", "down")


@dataclass(frozen=True)
class Family:
    """Tensor names of one model family. Defaults are those of LLaMA."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json. Families with fused projections are chosen by them:
    names alone do not tell the order of fused rows.
    """
    projections: tuple[Projection, ...]
    embedding: str = "embed_tokens.weight"
    """Name of the embedding below the language model's prefix."""
    head: str = "lm_head.weight"
    final_norm: str = "norm"
    """Module path of the norm behind the last layer, below the language model's prefix."""
    body: str = "model."
    """Prefix of embedding and layers in a checkpoint of the language model alone."""
    parameter_renames: tuple[tuple[str, str], ...] = ()
    """(Stored name, name of the parameter in transformers) where the two differ."""

    def find_prefixes(self, names: Iterable[str]) -> list[str]:
        """Return the prefixes of all tensors that are called like the embedding, in name order."""
        matching = [name for name in names if _ends_with(name, self.embedding)]
        return [name[: -len(self.embedding)] for name in sorted(matching)]

    def fits(self, shapes: Shapes, *, model_type: str) -> bool:
        """Return whether every matrix in the language model's layers is a projection of the family.

        Args:
            shapes: by name, of all tensors of a base model.
            model_type: of its text configuration.
        """
        prefixes = self.find_prefixes(shapes)
        if not prefixes or (self.has_fused_projections and model_type not in self.model_types):
            return False
        matrices = layer_matrices(shapes, prefix=prefixes[0])
        return bool(matrices) and all(self.is_projection(name, shapes[name]) for name in matrices)

    @property
    def has_fused_projections(self) -> bool:
        """Whether one Linear layer holds several projections."""
        return any(item.role in ("query_key_value", "gate_up") for item in self.projections)

    def projection_of(self, name: str) -> Projection | None:
        """Return the projection whose weight or bias a tensor is, None for all other tensors."""
        split = split_layer(name)
        if split is None:
            return None
        path, _, kind = split.path.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        return next((item for item in self.projections if item.path == path), None)

    def is_projection(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether a tensor is the weight of a projection: what `merge: linear` merges."""
        return len(shape) == 2 and name.endswith(".weight") and self.projection_of(name) is not None

    def is_routed_linear(self, path: str, shape: Sequence[int]) -> bool:
        """Return whether a composite routes tokens through the Linear layer at a module path.

        Args:
            path: of the module in the language model: `model.layers.0.mlp.up_proj`.
            shape: of its weight.
        """
        return self.is_projection(f"{path}.weight", shape)

    def role_of(self, name: str) -> Role | None:
        """Return what a tensor is, None for norms within layers and for unknown names."""
        if self.is_embedding(name):
            return "embedding"
        if self.is_head(name):
            return "head"
        projection = self.projection_of(name)
        if projection is not None:
            return projection.role
        if split_layer(name) is None and _ends_with(name.rpartition(".")[0], self.final_norm):
            return "final_norm"
        return None

    def is_embedding(self, name: str) -> bool:
        """Return whether a tensor is the token embedding."""
        return _ends_with(name, self.embedding)

    def is_head(self, name: str) -> bool:
        """Return whether a tensor is the language-model head."""
        return _ends_with(name, self.head)

    def is_vocabulary(self, name: str) -> bool:
        """Return whether the rows of a tensor are those of the vocabulary."""
        return self.is_embedding(name) or self.is_head(name)

    def find_embedding(self, names: Iterable[str]) -> str | None:
        """Return the name of the embedding among a language model's tensors."""
        return next((name for name in names if self.is_embedding(name)), None)

    def parameter_name(self, name: str) -> str:
        """Return what transformers calls the parameter that is stored under `name`."""
        return dict(self.parameter_renames).get(name, name)

    def stored_name(self, parameter: str) -> str:
        """Return the name under which checkpoints store a parameter of transformers."""
        return next((name for name, new in self.parameter_renames if new == parameter), parameter)

    def find_adapted_weight(
        self, module: str, names: Collection[str], *, prefix: str | None = None
    ) -> str | None:
        """Return the base's weight that a LoRA adapter belongs to, None where the base has none.

        Args:
            module: path of the adapted module in the adapter's files.
            names: of the base's tensors.
            prefix: of the language model in `names`. A multimodal base keeps it below another
                prefix than the class whose paths the adapter has.
        """
        body = self.body if prefix is None else prefix
        for wrapper in _WRAPPERS:
            if not module.startswith(wrapper):
                continue
            path = module[len(wrapper) :]
            plain = path.removeprefix(self.body)
            for candidate in (path, f"{self.body}{path}", plain, f"{body}{plain}"):
                if f"{candidate}.weight" in names:
                    return f"{candidate}.weight"
        return None

    def rule_of(self, name: str, shape: Sequence[int]) -> ParallelRule:
        """Return how a tensor is split over the ranks of tensor parallelism.

        Raises:
            PlacementError: a matrix whose split is unknown.
        """
        path, _, kind = name.rpartition(".")
        if self.is_vocabulary(name) or (kind == "bias" and self.is_head(f"{path}.weight")):
            return ParallelRule("vocabulary")
        projection = self.projection_of(name)
        if projection is None:
            if len(shape) == 1:
                return REPLICATED
            raise PlacementError(
                f"{name} {tuple(shape)}: model family {self.name!r} has no tensor-parallel rule for"
                " this matrix. Load on one device, or by layers"
            )
        if projection.role in _BY_COLUMNS:
            # The bias of a sum over ranks is added once.
            return REPLICATED if name.endswith(".bias") else ParallelRule("columns")
        if projection.is_interleaved:
            return ParallelRule("rows")
        return ParallelRule("rows", _ROW_PARTS[projection.role])

    def sums_over_ranks(self, path: str) -> bool:
        """Return whether the outputs of the Linear layer at a module path are summed over ranks."""
        projection = self.projection_of(f"{path}.weight")
        return projection is not None and projection.role in _BY_COLUMNS

    def unknown_projections(self, shapes: Shapes) -> list[str]:
        """Return the layer matrices that `merge: linear` would have to skip without a word."""
        prefixes = self.find_prefixes(shapes)
        matrices = layer_matrices(shapes, prefix=prefixes[0] if prefixes else "")
        return [name for name in matrices if not self.is_projection(name, shapes[name])]


def layer_matrices(shapes: Shapes, *, prefix: str) -> list[str]:
    """Return the tensors of two or more dimensions in the layers right below a prefix."""
    names = []
    for name, shape in shapes.items():
        split = split_layer(name)
        if split is not None and split.prefix == prefix and len(shape) >= 2:
            names.append(name)
    return names


def _ends_with(name: str, suffix: str) -> bool:
    """Return whether a dotted name ends with whole components."""
    return name == suffix or name.endswith(f".{suffix}")
