"""An expert's own processor, encoder and connector, run with transformers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import nn

from mmerge.manifests.errors import CheckpointError, MmergeError, PromptError
from mmerge.workers.families.registry import role_of
from mmerge.workers.modalities.decoder_inputs import DecoderCall, DecoderInputs, capture_calls
from mmerge.workers.modalities.expert_model import make_config, make_model
from mmerge.workers.modalities.image_files import describe_error
from mmerge.workers.modalities.processor_inputs import (
    describe_failure,
    name_extra,
    open_inputs,
)
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.small_files import to_loadable_files, write_files
from mmerge.workers.modalities.text_rules import measure_text_rules


def load_tokenizer(files: Mapping[str, bytes], *, config: Any, owner: str) -> Any:
    """Return the tokenizer among a model's files, of the class that its `config` implies.

    Raises:
        CheckpointError: transformers can load none.
    """
    loadable = to_loadable_files(files, owner=owner)
    with tempfile.TemporaryDirectory() as folder:
        write_files(loadable, Path(folder))
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise CheckpointError(
                f"{owner}: has no tokenizer that transformers can load ({describe_failure(error)})"
            ) from error


class MediaEncoder:
    """Turns inputs of one modality into the embeddings that enter the expert's language model.

    The expert's model class runs with a language model of zero layers. A hook captures the call of
    the decoder: the embeddings of the placeholder, as processor and forward pass laid them out, and
    what else the class hands over. A text token on either side of the input shows how its positions
    and its mask connect to text. One thread at a time encodes: neither processors nor hooks of a
    model are safe for threads.
    """

    def __init__(
        self,
        *,
        expert: str,
        modality: str,
        files: Mapping[str, bytes],
        state: dict[str, torch.Tensor],
        embedding: tuple[str, torch.Tensor],
        placeholder: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the encoder.

        Args:
            expert: its name, for errors.
            modality: what it encodes.
            files: the expert's configuration, tokenizer and processor files.
            state: the copied tensors, named as in the expert's files.
            embedding: name in the expert's files and values of its embedding, for wrapper tokens.
            placeholder: the text that stands for one input; from the processor if None.
            dtype, device: of the encoder.
        """
        owner = f"expert {expert!r}"
        config = make_config(files, owner=owner)
        self.expert, self.modality, self.dtype, self.device = expert, modality, dtype, device
        self.config = config
        headless = copy.deepcopy(config)
        text = headless.get_text_config()
        text.num_hidden_layers = 0
        embedding_name, embedding_weight = embedding
        text.vocab_size = embedding_weight.shape[0]
        model = make_model(
            headless,
            state | {embedding_name: embedding_weight},
            dtype=dtype,
            owner=owner,
            may_lack=lambda key: role_of(key) in ("head", "final_norm"),
        )
        self.model = model.to(device)
        self.inputs = open_inputs(config.model_type, files, owner=owner)
        self.placeholder = placeholder or self.inputs.find_placeholder(modality, owner=owner)
        token = getattr(getattr(self.inputs, "processor", None), f"{modality}_token", None)
        self.placeholders: tuple[str, ...] = (self.placeholder,)
        """Texts that stand for an input: with its wrappers, and as the processor expands it."""
        if isinstance(token, str) and token != self.placeholder:
            self.placeholders += (token,)
        self.text_id = _find_text_id(config)
        self.text_rules = measure_text_rules(self.model, token=self.text_id, owner=owner)
        self._turn = Lock()

    def encode(self, part: Part) -> torch.Tensor:
        """Return the embeddings of one input, [tokens, hidden].

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
        """
        return self.encode_for_decoder(part).embeds

    @torch.inference_mode()
    def encode_for_decoder(self, part: Part) -> DecoderInputs:
        """Return all that the expert's class hands its decoder for one input.

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
            CheckpointError: the class hands over what a composite does not carry over.
        """
        with self._turn:
            inputs = self.make_inputs(part)
            keep = self.inputs.without_frame(inputs["input_ids"][0]).nonzero().reshape(-1).tolist()
            before, behind = self._count_wrappers(part)
            call = self._capture_call(add_text(inputs, self.text_id), part)
            # The text token in front moves every other token by one.
            first, end = keep[0] + 1 + before, keep[-1] + 2 - behind
            return call.read(first, end, owner=f"expert {self.expert!r}")

    def _count_wrappers(self, part: Part) -> tuple[int, int]:
        """Return how many tokens stand around an input whose prompt has its wrappers as text.

        The class sees them all the same: the Omni thinkers find images by the wrapper in front.
        """
        if not part.placeholder or part.placeholder not in self.placeholder:
            return 0, 0
        first, _, last = self.placeholder.partition(part.placeholder)
        tokenizer = self.inputs.tokenizer
        before, behind = (
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
            for text in (first, last)
        )
        return before, behind

    def make_inputs(self, part: Part) -> dict[str, torch.Tensor]:
        """Return the arguments of the class for a prompt of one input alone.

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
        """
        try:
            placeholder = self.placeholder
            if part.placeholder and part.placeholder not in placeholder:
                placeholder = part.placeholder
            inputs = self.inputs.make(placeholder, self.modality, part)
        except MmergeError:
            raise
        except Exception as error:
            name = part.value if isinstance(part.value, (str, Path)) else f"the {part.kind}"
            raise PromptError(
                f"{name}: the processor of expert {self.expert!r} does not take it"
                f" ({describe_error(error)}){name_extra(error)}"
            ) from error
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            # The processor of PaliGemma returns labels for training, whatever it is asked.
            if isinstance(value, torch.Tensor) and name != "labels"
        }

    def _capture_call(self, inputs: Mapping[str, Any], part: Part) -> DecoderCall:
        """Return the call of the decoder in one forward pass.

        The hook belongs to this pass alone, so no call for another input can be returned.
        """
        try:
            with capture_calls(self.model) as calls:
                self.model(**inputs, use_cache=False)
        except MmergeError:
            raise
        except Exception as error:
            raise PromptError(
                f"the {part.kind}: the encoder of expert {self.expert!r} fails on it"
                f" ({type(error).__name__}: {describe_error(error)})"
            ) from error
        if len(calls) != 1:
            raise CheckpointError(
                f"expert {self.expert!r}: its model calls its decoder {len(calls)} times for one"
                " prompt, expected one call"
            )
        return calls[0]


_TEXT_FILL = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Arguments with one number per token, and that of text."""


def add_text(
    inputs: Mapping[str, torch.Tensor], text_id: int, *, before: int = 1, behind: int = 1
) -> dict[str, torch.Tensor]:
    """Return the arguments of a class with text tokens around the tokens of a prompt of one."""
    framed = dict(inputs)
    fills = {"input_ids": text_id, **_TEXT_FILL}
    for name in fills.keys() & inputs.keys():
        framed[name] = nn.functional.pad(inputs[name], (before, behind), value=fills[name])
    return framed


def keep_tokens(inputs: Mapping[str, torch.Tensor], keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a class for some of the tokens of a prompt, a mask [tokens]."""
    kept = dict(inputs)
    for name in {"input_ids", *_TEXT_FILL} & inputs.keys():
        kept[name] = inputs[name][:, keep]
    return kept


def _find_text_id(config: Any) -> int:
    """Return the id of a token that a class takes for text: none that its configuration names."""
    special: set[int] = set()
    pending = [config.to_dict()]
    while pending:
        values = pending.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int) and name.endswith(("_id", "_index", "_token")):
                special.add(value)
    return next(number for number in range(len(special) + 1) if number not in special)
