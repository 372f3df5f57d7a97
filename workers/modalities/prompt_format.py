"""How prompts are formed: by the recipe's templates, or by a chat template of base or expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmerge.manifests.errors import PromptError
from mmerge.manifests.format.manifest import Manifest
from mmerge.workers.modalities.chat_template import REMEDY, ChatPart, ChatTemplate
from mmerge.workers.modalities.prompt import (
    Part,
    arrange,
    check_places,
    find_media_templates,
    make_prompt,
)

BASE = "base"
NONE = "none"
"""Values of `chat_template_from` that are no experts."""


@dataclass(frozen=True)
class PromptFormat:
    """Forms the prompts of one composite."""

    manifest: Manifest
    expert: str | None
    """The rebuilt expert in retention; None in expansion."""
    chats: Mapping[str, ChatTemplate]
    """By expert, and under `base`."""
    find_expert: Callable[[str], str]
    """Returns the expert of a part's kind. Raises PromptError."""
    find_placeholders: Callable[[str], tuple[str, ...]]
    """Returns the texts that may stand for an input of an expert in its chat template."""

    def make(
        self,
        question: str | Sequence[Part],
        media: Sequence[Part],
        *,
        bos: str | None,
        num_rows: int,
    ) -> list[Part]:
        """Return the parts of a prompt.

        Args:
            question: the text, with places such as `{image}` if inputs stand within it; or all
                parts of a message in order, whose text has no places.
            media: the inputs of a question that is a text.
            bos: the token that the composite puts before every prompt, None if there is none.
            num_rows: of the composite's embedding.

        Raises:
            PromptError: the question has a place without an input, an input belongs to no expert,
                or the chat template does not fit the prompt.
        """
        if isinstance(question, str):
            kinds = {kind for item in self.manifest.experts for kind in (item.name, item.modality)}
            check_places(question, media, kinds=kinds)
            lay_out = partial(make_prompt, question, media)
        else:
            lay_out = partial(arrange, question)
            media = [part for part in question if part.kind != "text"]
        owner = self._choose(media)
        if owner is None:
            return lay_out(
                template=self.manifest.template,
                media_templates=find_media_templates(self.manifest.experts),
            )
        return self._make_chat(owner, lay_out, media, bos=bos, num_rows=num_rows)

    def _choose(self, media: Sequence[Part]) -> str | None:
        """Return whose chat template forms a prompt: an expert, `base`, or None for nobody's."""
        source = self.manifest.chat_template_from
        if self.manifest.template is not None or source == NONE or not self.chats:
            return None
        if source is not None and (source == BASE or self.expert in (None, source)):
            if source in self.chats:
                return source
            raise PromptError(
                f"the recipe's 'chat_template_from' names {source!r}, which has no chat template."
                f" {REMEDY}"
            )
        if self.expert is not None:
            return self.expert if self.expert in self.chats else None
        owners = list(dict.fromkeys(self._find_owner(part) for part in media))
        if len(owners) == 1:
            return owners[0] if owners[0] in self.chats else None
        # Text alone, or inputs of several experts: none of them was trained with such a prompt.
        return next((owner for owner in (BASE, *owners) if owner in self.chats), None)

    def _find_owner(self, part: Part) -> str:
        """Return the expert that reads an input, or `base`: a multimodal base has an encoder."""
        name = self.find_expert(part.kind)
        return name if any(record.name == name for record in self.manifest.experts) else BASE

    def _make_chat(
        self,
        owner: str,
        lay_out: Callable[..., list[Part]],
        media: Sequence[Part],
        *,
        bos: str | None,
        num_rows: int,
    ) -> list[Part]:
        chat = self.chats[owner]
        placeholders: dict[str, tuple[str, ...]] = {}
        media_templates: dict[str, str] = {}
        for part in media:
            expert = self.find_expert(part.kind)
            if self._find_owner(part) == owner:
                placeholders[part.kind] = self.find_placeholders(expert)
            if not placeholders.get(part.kind):
                media_templates[part.kind] = self._find_template(expert)
        items = [
            ChatPart(part, placeholders.get(part.kind, ()))
            for part in lay_out(template=None, media_templates=media_templates)
        ]
        segments = chat.format([self._with_modality(item) for item in items])
        if bos and segments and isinstance(segments[0], str):
            # Templates write the token that the composite puts before every prompt.
            segments[0] = segments[0].removeprefix(bos)
        if owner == BASE and not any(placeholders.values()):
            return [
                Part.text(segment) if isinstance(segment, str) else segment
                for segment in segments
                if segment != ""
            ]
        prompt = chat.tokenise(segments)
        self._check_rows(prompt, chat, num_rows=num_rows)
        return prompt

    def _find_template(self, expert: str) -> str:
        """Return what stands around an input that the chat template does not know."""
        records = [record for record in self.manifest.experts if record.name == expert]
        return (records[0].template if records else None) or "{media}\n"

    def _with_modality(self, item: ChatPart) -> ChatPart:
        """Return a part whose kind is its modality, as templates name it; not that of an expert."""
        if not item.placeholders:
            return item
        records = [record for record in self.manifest.experts if record.name == item.part.kind]
        modality = records[0].modality if records else item.part.kind
        return ChatPart(item.part, item.placeholders, modality)

    def _check_rows(self, prompt: Sequence[Part], chat: ChatTemplate, *, num_rows: int) -> None:
        """Raise PromptError for a token of the template that the composite's embedding lacks."""
        for part in prompt:
            if part.kind != "ids":
                continue
            beyond = [token for token in part.value if token >= num_rows]
            if beyond:
                token: Any = chat.tokenizer.convert_ids_to_tokens(beyond[0])
                raise PromptError(
                    f"the chat template of {chat.owner} uses the token {token!r} of id {beyond[0]},"
                    f" and the composite's vocabulary has {num_rows} rows. Load the expert alone"
                    f" (retention), or choose another: {REMEDY}"
                )
