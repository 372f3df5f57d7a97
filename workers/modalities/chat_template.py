"""An expert's chat template: from the parts of a prompt to token ids and inputs.

The template is rendered with marks in the places of the texts, so that no text of a user can be
taken for a part of the template, and each layout of a prompt is rendered once. The result is
tokenised as the expert's processor does: whole, by the expert's own tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.checkpoints.tokenizer import parse_chat_template
from mmerge.workers.modalities import render_template
from mmerge.workers.modalities.prompt import Part, check_text

RENDER_SECONDS = 2
RENDER_BYTES = 256 << 20
"""Processor time and memory for rendering all forms of a prompt."""
_START_SECONDS = 120
"""For the whole program: importing transformers takes two seconds, more on a busy machine."""
_SPACE = "\u2005"
"""Stands on both sides of a text: a template that trims its texts removes it. None writes it."""
_MARK = re.compile(f"({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)|\ue002([0-9]+)\ue003")
"""Marks of a text, and of an input that the template does not know. Characters for private use."""
_CACHED_LAYOUTS = 256
Content = str | list[dict[str, str]]
REMEDY = "Give 'template' in the recipe, or 'chat_template_from: none'"


@dataclass(frozen=True)
class ChatPart:
    """One part of a prompt before it is formatted; `placeholders` are those of the template.

    Without placeholders an input stands where a text would: the template knows no such input.
    """

    part: Part
    placeholders: tuple[str, ...] = ()
    """Texts that may stand for the input in a rendered template, the most specific one first."""
    modality: str = ""
    """The type of the input in the content of a message."""


class ChatTemplate:
    """The chat template of one checkpoint."""

    def __init__(
        self,
        template: str,
        *,
        owner: str,
        load_tokenizer: Callable[[], Any],
    ) -> None:
        """Keep the template's text; the tokenizer is loaded when it is first needed."""
        limits.CHAT_TEMPLATE_CHARACTERS.check(
            len(template), where=f"{owner}: its chat template", error=CheckpointError
        )
        self.owner, self._template, self._load_tokenizer = owner, template, load_tokenizer
        _renderers.prepare()

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._load_tokenizer()

    def format(self, parts: Sequence[ChatPart]) -> list[str | Part]:
        """Return the whole prompt: texts of template and question, and inputs.

        Raises:
            PromptError: the template fails, or leaves out a text or an input.
        """
        for item in parts:
            if item.part.kind == "text":
                check_text(item.part.value)
        candidates = [_to_list(parts), _to_string(parts)]
        if not any(item.placeholders for item in parts):
            candidates.reverse()  # a language model's template takes texts, not lists
        tokens = {
            name: token
            for name, token in self.tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        results = _render(self._template, json.dumps(tokens), json.dumps(candidates))
        reasons = []
        for result in json.loads(results):
            segments, reason = _split(result, parts)
            if not reason:
                return segments
            reasons.append(reason)
        raise PromptError(
            f"the chat template of {self.owner} cannot be used for this prompt: {reasons[0]}."
            f" {REMEDY}"
        )

    def tokenise(self, segments: Sequence[str | Part]) -> list[Part]:
        """Return a formatted prompt as token ids and inputs.

        Between inputs that the template does not know, the text is tokenised whole, so that words
        beside a placeholder become the tokens that the expert was trained with.

        Raises:
            PromptError: a token is part of a text and of a placeholder.
        """
        prompt: list[Part] = []
        chunk: list[str | Part] = []
        for segment in [*segments, None]:
            if segment is not None and (isinstance(segment, str) or segment.placeholder):
                chunk.append(segment)
                continue
            prompt += self._tokenise_chunk(chunk)
            chunk = []
            if segment is not None:
                prompt.append(segment)
        return prompt

    def _tokenise_chunk(self, chunk: Sequence[str | Part]) -> list[Part]:
        texts = [item if isinstance(item, str) else str(item.placeholder) for item in chunk]
        if not self.tokenizer.is_fast:
            return [
                Part("ids", self.tokenizer(item, add_special_tokens=False)["input_ids"])
                if isinstance(item, str)
                else item
                for item in chunk
            ]
        encoded = self.tokenizer(
            "".join(texts), add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [sum(map(len, texts[: index + 1])) for index in range(len(texts))]
        ids: list[list[int]] = [[] for _ in texts]
        for token, (start, stop) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            index = next((i for i, end in enumerate(ends) if start < end), len(ends) - 1)
            if stop > ends[index]:
                raise PromptError(
                    f"the chat template of {self.owner} has a token that reaches over the end of"
                    f" {texts[index]!r}, so its inputs have no place. {REMEDY}"
                )
            ids[index].append(token)
        return [
            item if isinstance(item, Part) else Part("ids", ids[index])
            for index, item in enumerate(chunk)
            if isinstance(item, Part) or ids[index]
        ]


def find_chat_template(files: Mapping[str, bytes], *, owner: str) -> str | None:
    """Return the chat template among a checkpoint's files, None if there is none.

    Raises:
        CheckpointError: a file is malformed, or none of several named templates is the default.
    """
    template = parse_chat_template(files.get, where=owner)
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}
    if isinstance(template, dict):
        only = next(iter(template.values())) if len(template) == 1 else False
        template = template.get("default", only)
    if template is None or isinstance(template, str):
        return template or None
    raise CheckpointError(
        f"{owner}: has chat templates, and which one is the default is unclear. {REMEDY}"
    )


def _mark(index: int, item: ChatPart) -> str:
    if item.part.kind == "text":
        return f"{_SPACE}\ue000{index}\ue001{_SPACE}"
    return f"\ue002{index}\ue003"


def _to_list(parts: Sequence[ChatPart]) -> Content:
    """Return the content of a message as templates of multimodal models take it."""
    content: list[dict[str, str]] = []
    for index, item in enumerate(parts):
        if item.placeholders:
            content.append({"type": item.modality or item.part.kind})
            continue
        text = _mark(index, item)
        if content and content[-1]["type"] == "text":
            content[-1]["text"] += text
        else:
            content.append({"type": "text", "text": text})
    return content


def _to_string(parts: Sequence[ChatPart]) -> Content:
    """Return the content of a message as one text, each placeholder on a line of its own."""
    texts = []
    for index, item in enumerate(parts):
        if item.placeholders:
            texts.append(f"{item.placeholders[0]}\n")
        else:
            texts.append(_mark(index, item))
    return "".join(texts)


@lru_cache(maxsize=_CACHED_LAYOUTS)
def _render(template: str, tokens: str, contents: str) -> str:
    """Return a JSON list of texts or errors, one for each of the `contents`.

    Raises:
        PromptError: the template takes too long, or its process cannot run.
    """
    request = {
        "template": template,
        "tokens": json.loads(tokens),
        "contents": json.loads(contents),
        "memory_bytes": RENDER_BYTES,
        "seconds": RENDER_SECONDS,
        "characters": limits.PROMPT_CHARACTERS.value,
    }
    process = _renderers.take()
    try:
        answer, _ = process.communicate(json.dumps(request).encode(), timeout=_START_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        process.kill()
        process.wait()
        raise PromptError(f"a chat template cannot be rendered ({error}). {REMEDY}") from error
    if process.returncode:
        raise PromptError(
            f"a chat template takes more than {RENDER_SECONDS} s or {RENDER_BYTES >> 20} MiB to"
            f" render. {REMEDY}"
        )
    return answer.decode()


class _Renderers:
    """Starts processes that render one request each, one of them ahead of its request."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._spare: tuple[int, subprocess.Popen[bytes]] | None = None

    def prepare(self) -> None:
        """Start a process that waits for its request; it ends with this one."""
        with self._lock:
            if self._spare is None or self._spare[0] != os.getpid():
                self._spare = (os.getpid(), self._start())

    def take(self) -> subprocess.Popen[bytes]:
        """Return a process for one request."""
        with self._lock:
            spare, self._spare = self._spare, None
        # A forked process has the spare of its parent.
        return spare[1] if spare is not None and spare[0] == os.getpid() else self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", render_template.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


_renderers = _Renderers()


def _split(result: Mapping[str, str], parts: Sequence[ChatPart]) -> tuple[list[str | Part], str]:
    """Return the texts and inputs of a rendered template, and what is wrong with it if anything."""
    if "error" in result:
        return [], result["error"]
    rendered = result["text"]
    marked = [index for index, item in enumerate(parts) if not item.placeholders]
    written = sorted(int(match[2] or match[4]) for match in _MARK.finditer(rendered))
    if written != marked or "'type': 'text'" in rendered:
        return [], "it does not write every text of the message once"
    inputs = [item for item in parts if item.placeholders]
    placeholder = ""
    if inputs:
        candidates = inputs[0].placeholders
        placeholder = next((text for text in candidates if rendered.count(text) == len(inputs)), "")
        if not placeholder:
            return [], f"it does not write {candidates[0]!r} once for each input"
    return _cut(rendered, parts, placeholder), ""


def _cut(rendered: str, parts: Sequence[ChatPart], placeholder: str) -> list[str | Part]:
    """Return a rendered template with texts and inputs in the places of marks and placeholders."""
    segments: list[str | Part] = []
    inputs = iter([item.part for item in parts if item.placeholders])
    position = 0
    pattern = f"{_MARK.pattern}|({re.escape(placeholder)})" if placeholder else _MARK.pattern
    for match in re.finditer(pattern, rendered):
        _append(segments, rendered[position : match.start()])
        position = match.end()
        if match[4]:
            segments.append(parts[int(match[4])].part)
            continue
        if match[2] is None:
            segments.append(replace(next(inputs), placeholder=placeholder))
            continue
        question: str = parts[int(match[2])].part.value
        text = question if match[1] else question.lstrip()
        _append(segments, text if match[3] else text.rstrip())
    _append(segments, rendered[position:])
    return segments


def _append(segments: list[str | Part], text: str) -> None:
    if not text:
        return
    if segments and isinstance(segments[-1], str):
        segments[-1] += text
    else:
        segments.append(text)
