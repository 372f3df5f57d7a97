"""Adapter folders of PEFT and of Model Composition: names, byte ranges and scales.

A folder holds one or several named adapters (DAMC: `default` for text tokens, one for the tokens of
the modality), in one file or, as PEFT saves them, in one subfolder each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.workers.adapters.files import CONFIG_FILE, AdapterFiles
from mmerge.workers.adapters.module_patterns import ModulePatterns
from mmerge.workers.adapters.names import (
    EMBEDDING_FACTOR,
    NESTED,
    is_unread,
    match_part,
    match_token_rows,
    whole_name,
)
from mmerge.workers.checkpoints.sources import TensorSource

DEFAULT_ADAPTER = "default"


@dataclass(frozen=True)
class AdapterPair:
    """Both factors of one adapter in one module; the task vector is scale·B·A."""

    module: str
    """Path of the module in the adapter's files."""
    adapter: str
    a: TensorSource
    """[rank, in]; with a convolution [rank, in, height, width], with an embedding [rank, rows]."""
    b: TensorSource
    """[out, rank]; with a convolution [out, rank, 1, 1], with an embedding [columns, rank]."""
    magnitude: TensorSource | None = None
    """One norm per row of the adapted weights (DoRA), None without."""
    is_embedding: bool = False
    """Whether rows of an embedding are adapted: A and B are stored transposed."""

    @property
    def rank(self) -> int:
        """Rows of A; with LoRA on a stack of matrices, the sum over the stack."""
        return self.a.spec.shape[0]

    @property
    def owner_module(self) -> str:
        """The module whose parameters are adapted, without PEFT's nesting."""
        return NESTED.sub("", self.module)

    @property
    def is_plain(self) -> bool:
        """Whether this is LoRA of a Linear layer."""
        return (
            self.magnitude is None
            and not self.is_embedding
            and len(self.a.spec.shape) == 2
            and self.module == self.owner_module
        )


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding or head that an adapter replaces (`trainable_token_indices`)."""

    module: str
    adapter: str
    rows: TensorSource
    """[number of tokens, hidden]."""
    tokens: tuple[int, ...]
    """The row of the embedding that each is."""


class AdapterFolder:
    """One folder of adapters: its configuration and the headers of its files."""

    def __init__(self, uri: str, *, owner: str) -> None:
        """Open the folder at `uri`; `owner` ("expert 'image'") begins every error. Raises
        CheckpointError.
        """
        self.uri, self.owner = uri, owner
        self.checkpoint = AdapterFiles(uri, owner=owner)
        self._patterns = ModulePatterns(where=f"{owner}: {uri}")

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by stored name; names from subfolders include their adapter's name."""
        return self.checkpoint.tensors

    @cached_property
    def pairs(self) -> tuple[AdapterPair, ...]:
        """Every adapter in every module.

        Raises:
            CheckpointError, ShapeMismatch: a factor is missing or does not fit the other.
        """
        parts: dict[tuple[str, str, bool], dict[str, TensorSource]] = {}
        magnitudes: dict[tuple[str, str], TensorSource] = {}
        for name, source in self.tensors.items():
            match = match_part(name)
            if match is not None:
                adapter = match["adapter"] or DEFAULT_ADAPTER
                if match["part"] == "magnitude":
                    magnitudes[match["module"], adapter] = source
                else:
                    key = (match["module"], adapter, match.re is EMBEDDING_FACTOR)
                    parts.setdefault(key, {})[match["part"]] = source
            elif is_unread(name):
                raise CheckpointError(
                    f"{self.owner}: {self.uri}: {name} is no LoRA factor that is read. Merge that"
                    " adapter into its weights first (PEFT: merge_and_unload, save_pretrained)"
                )
        pairs = [
            self._make_pair(key, sources, magnitudes.pop(key[:2], None))
            for key, sources in sorted(parts.items())
        ]
        if magnitudes:
            module, adapter = min(magnitudes)
            raise CheckpointError(
                f"{self.owner}: {self.uri}: {module}: adapter {adapter!r} has a"
                " lora_magnitude_vector and no factors. Fetch the adapter again"
            )
        return tuple(pairs)

    @cached_property
    def token_rows(self) -> tuple[TokenRows, ...]:
        """Every set of rows that an adapter replaces. Raises CheckpointError, ShapeMismatch."""
        rows = []
        for name, source in self.tensors.items():
            match = match_token_rows(name)
            if match:
                adapter = match["adapter"] or DEFAULT_ADAPTER
                rows.append(self._make_token_rows(match["module"], adapter, source))
        return tuple(rows)

    @cached_property
    def others(self) -> dict[str, TensorSource]:
        """All tensors that are no parts of adapters, by stripped name.

        These are connectors, learned prefix tokens and tensors saved whole.
        """
        whole = {}
        for name, source in self.tensors.items():
            plain = whole_name(name)
            if plain is not None:
                whole[plain] = source
        return whole

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, sorted."""
        names = {pair.adapter for pair in self.pairs}
        return tuple(sorted(names | {rows.adapter for rows in self.token_rows}))

    @property
    def default_adapter(self) -> str:
        """The adapter of text tokens: the only one, or that of this name."""
        return self.adapters[0] if len(self.adapters) == 1 else DEFAULT_ADAPTER

    def pairs_of(self, adapter: str) -> tuple[AdapterPair, ...]:
        """Return the pairs of one adapter. Raises CheckpointError if there is none of that name."""
        if adapter not in self.adapters:
            raise CheckpointError(
                f"{self.owner}: {self.uri} has no adapter {adapter!r}; it has"
                f" {', '.join(self.adapters) or 'none'}"
            )
        return tuple(pair for pair in self.pairs if pair.adapter == adapter)

    def plain_pairs_of(self, adapter: str, *, use: str) -> tuple[AdapterPair, ...]:
        """Return the pairs of one adapter for what can use LoRA of Linear layers alone.

        Args:
            adapter: its name.
            use: what uses them ("damc"), for the error.

        Raises:
            CheckpointError: there is none of that name, or it has more than such pairs.
        """
        pairs = self.pairs_of(adapter)
        modules = [pair.module for pair in pairs if not pair.is_plain]
        modules += [rows.module for rows in self.token_rows if rows.adapter == adapter]
        if modules:
            raise CheckpointError(
                f"{self.owner}: {self.uri}: {use} reads plain LoRA of Linear layers alone, and the"
                f" adapter of {modules[0]} is another kind (DoRA, token rows, embeddings,"
                " convolutions or parameters). Use a method that merges"
            )
        return pairs

    def scale_of(
        self, pair: AdapterPair, *, parameter: str | None = None, num_matrices: int = 1
    ) -> float:
        """Return the factor of B·A: alpha/rank, or alpha/√rank with rsLoRA.

        Args:
            pair: both factors.
            parameter: path of the adapted parameter, if that is not the module's `weight`.
            num_matrices: matrices of a stack, each of which has its own factors.

        Raises:
            CheckpointError: the configuration has no alpha, or another rank than the factors.
        """
        where = f"{self.owner}: {self.uri}: {pair.module}: adapter {pair.adapter!r}"
        config = self.checkpoint.configs.get(pair.adapter, self.checkpoint.config)
        module = parameter or pair.module
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
        rank, remainder = divmod(pair.rank, num_matrices)
        if remainder or (expected is not None and expected != rank):
            raise CheckpointError(
                f"{where}: the configuration says rank {expected}, the factors have {rank}. Fetch"
                " the adapter again"
            )
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def target_parameters(self, adapter: str) -> tuple[str, ...]:
        """Return the ends of the names of parameters that an adapter adapts outside Linears."""
        config = self.checkpoint.configs.get(adapter, self.checkpoint.config)
        names = config.get("target_parameters") or ()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            if not names:
                return ()
            raise CheckpointError(
                f"{self.owner}: {self.uri}/{CONFIG_FILE}: target_parameters {names!r} is no list of"
                " names. Fetch the adapter again"
            )
        return tuple(names)

    def _make_pair(
        self,
        key: tuple[str, str, bool],
        sources: dict[str, TensorSource],
        magnitude: TensorSource | None,
    ) -> AdapterPair:
        module, adapter, is_embedding = key
        where = f"{self.owner}: {self.uri}: {module}: adapter {adapter!r}"
        prefix = "lora_embedding_" if is_embedding else "lora_"
        if set(sources) != {"A", "B"}:
            raise CheckpointError(
                f"{where} has only {prefix}{next(iter(sources))}. Fetch the adapter again"
            )
        a, b = sources["A"], sources["B"]
        shapes = a.spec.shape, b.spec.shape
        if (
            min(map(len, shapes)) < 2
            or len(shapes[0]) != len(shapes[1])
            or shapes[0][0] != shapes[1][1]
            or any(side != 1 for side in shapes[1][2:])
        ):
            raise ShapeMismatch(
                f"{where}: {prefix}A has {shapes[0]} and {prefix}B {shapes[1]}; they must be (rank,"
                " in) and (out, rank), with sides of 1 behind it in convolutions"
            )
        self._check_dora(adapter, magnitude, is_embedding=is_embedding, where=where)
        return AdapterPair(module, adapter, a, b, magnitude, is_embedding)

    def _check_dora(
        self, adapter: str, magnitude: TensorSource | None, *, is_embedding: bool, where: str
    ) -> None:
        """Raise CheckpointError where configuration and files disagree on DoRA, or it is unread."""
        config = self.checkpoint.configs.get(adapter, self.checkpoint.config)
        if bool(config.get("use_dora")) != (magnitude is not None):
            has = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
            raise CheckpointError(
                f"{where} has {has}, but the configuration says use_dora"
                f" {config.get('use_dora')!r}. Fetch the adapter again"
            )
        if magnitude is not None and is_embedding:
            raise CheckpointError(
                f"{where} is DoRA of an embedding, whose norms are those of whole columns: it is"
                " not read. Merge it into its base first (PEFT: merge_and_unload, save_pretrained)"
            )

    def _make_token_rows(self, module: str, adapter: str, rows: TensorSource) -> TokenRows:
        where = f"{self.owner}: {self.uri}: {module}: adapter {adapter!r}"
        config = self.checkpoint.configs.get(adapter, self.checkpoint.config)
        tokens = _find_tokens(config, module)
        if tokens is None:
            raise CheckpointError(
                f"{where} has trained token rows (trainable_tokens_delta), but the configuration"
                " has no list of tokens for it (trainable_token_indices). Fetch the adapter again"
            )
        if len(rows.spec.shape) != 2 or rows.spec.shape[0] != len(tokens):
            raise ShapeMismatch(
                f"{where}: trainable_tokens_delta has {rows.spec.shape}, the configuration lists"
                f" {len(tokens)} tokens. Fetch the adapter again"
            )
        if len(set(tokens)) != len(tokens) or min(tokens, default=0) < 0:
            raise CheckpointError(
                f"{where}: the configuration lists a token twice, or a negative one, so that its"
                " row is unclear. Correct trainable_token_indices"
            )
        return TokenRows(module, adapter, rows, tuple(tokens))


def _find_tokens(config: Mapping[str, Any], module: str) -> list[int] | None:
    """Return the tokens whose rows an adapter trains in a module, None where it does not say."""
    tokens = config.get("trainable_token_indices")
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        tokens = config.get("token_indices")
    if isinstance(tokens, dict):
        # PEFT compares ends of paths: `embed_tokens` is `model.embed_tokens`.
        matching = [
            value for key, value in tokens.items() if f".{module}".endswith(f".{key.lstrip('.')}")
        ]
        tokens = matching[0] if len(matching) == 1 else None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        return None
    return tokens
