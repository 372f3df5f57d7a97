"""Compose the parts of a prompt into what the language model takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmerge.manifests.errors import PromptError
from mmerge.workers.composite.decoder.prompt_inputs import Piece, PromptInputs, compose
from mmerge.workers.composite.prompt_batch import check_finite, to_tokens
from mmerge.workers.composite.routing import TEXT
from mmerge.workers.modalities.decoder_inputs import DecoderInputs
from mmerge.workers.modalities.encoders import Encoder, encode_for_decoder
from mmerge.workers.modalities.prompt import Part


class PromptComposer:
    """Tokenises and encodes the parts of prompts."""

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any,
        *,
        encoders: Mapping[str, Encoder],
        names: Sequence[str],
        find_expert: Callable[[str], str],
        text_is_prefix: bool = False,
    ) -> None:
        """Prepare.

        Args:
            language_model, tokenizer: of the composite.
            encoders: of the loaded experts, by name.
            names: of all experts of the build, in the order of their modality ids.
            find_expert: returns the expert of a part of a kind, or raises PromptError.
            text_is_prefix: whether all tokens of a prompt of text alone see each other.
        """
        self.language_model, self.tokenizer = language_model, tokenizer
        self.encoders, self.names, self.find_expert = encoders, tuple(names), find_expert
        self.text_is_prefix = text_is_prefix

    def compose(self, parts: Sequence[Part], *, num_answer: int = 0) -> PromptInputs:
        """Return a prompt, after the tokenizer's BOS if it adds one.

        Args:
            parts: text is tokenised part by part. Everything that an encoder returns has the
                modality of its expert.
            num_answer: tokens at the end that are an answer to the prompt.

        Raises:
            PromptError: the prompt is empty, or a part cannot be read or belongs to no expert.
        """
        leading_ids = self.leading_ids()
        all_parts = [Part("ids", leading_ids), *parts] if leading_ids else list(parts)
        pieces = [self._to_piece(part) for part in all_parts]
        if not sum(len(piece.inputs.embeds) for piece in pieces):
            raise PromptError("the prompt is empty: give a question, or an image, audio or video")
        return compose(pieces, num_answer=num_answer, text_is_prefix=self.text_is_prefix)

    def compose_all(
        self, prompts: Sequence[Sequence[Part]], *, num_answers: Sequence[int] | None = None
    ) -> list[PromptInputs]:
        """Return what `compose` returns for each prompt; an error has the index of its prompt."""
        composed = []
        for index, parts in enumerate(prompts):
            try:
                num_answer = num_answers[index] if num_answers else 0
                composed.append(self.compose(parts, num_answer=num_answer))
            except PromptError as error:
                error.index = index
                raise
        return composed

    def _to_piece(self, part: Part) -> Piece:
        device = self.language_model.device
        if part.kind in ("text", "ids"):
            table = self.language_model.get_input_embeddings()
            tokens = to_tokens(part, self.tokenizer, num_tokens=len(table.weight))
            embeds = table(torch.tensor(tokens, dtype=torch.long, device=device))
            return Piece(DecoderInputs.from_embeds(embeds), TEXT, "")
        name = self.find_expert(part.kind)
        inputs = encode_for_decoder(self.encoders[name], part).to(device)
        check_finite(inputs.embeds, part, expert=name)
        # The encoder of a multimodal base is no expert's: its tokens have the weights of text.
        modality = self.names.index(name) if name in self.names else TEXT
        return Piece(inputs, modality, name)

    def leading_ids(self) -> list[int]:
        """Return the tokenizer's BOS if it adds one to a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []
