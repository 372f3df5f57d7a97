"""The chat templates of a build, by base and expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.workers.checkpoints.tokenizer import TEMPLATE_FILES
from mmerge.workers.modalities.chat_template import ChatTemplate, find_chat_template
from mmerge.workers.modalities.expert_model import make_config
from mmerge.workers.modalities.processor_encoder import load_tokenizer
from mmerge.workers.modalities.prompt_format import BASE, NONE
from mmerge.workers.reconstruction.language_reader import LanguageReader


def load_chats(reader: LanguageReader, expert: str | None) -> dict[str, ChatTemplate]:
    """Return the chat templates that may form prompts, by expert, and under `base`.

    Templates of the recipe take their place: none is returned where the recipe has a `template`,
    and none of an expert with a `template` of its own.

    Args:
        reader: the build.
        expert: the rebuilt one, None for all.

    Raises:
        CheckpointError: a template cannot be read.
    """
    manifest = reader.manifest
    if manifest.template is not None or manifest.chat_template_from == NONE:
        return {}
    owners = [(BASE, manifest.base.files)]
    for name in [expert] if expert else reader.expert_names:
        if manifest.to_expert(name).template is None:
            owners.append((name, reader.encoder_files(name)))
    chats = {}
    for name, files in owners:
        owner = "the base" if name == BASE else f"expert {name!r}"
        chat = _load_chat(reader, files, owner=owner)
        if chat is not None:
            chats[name] = chat
    return chats


def _load_chat(
    reader: LanguageReader, entries: tuple[FileEntry, ...], *, owner: str
) -> ChatTemplate | None:
    named = [entry for entry in entries if entry.name in TEMPLATE_FILES]
    template = find_chat_template(_read(reader, named), owner=owner)
    if template is None:
        return None
    return ChatTemplate(
        template, owner=owner, load_tokenizer=_make_loader(reader, entries, owner=owner)
    )


def _make_loader(
    reader: LanguageReader, entries: Iterable[FileEntry], *, owner: str
) -> Callable[[], Any]:
    """Return a function that loads the tokenizer: few prompts need those of all experts."""

    def load() -> Any:
        files = _read(reader, entries)
        return load_tokenizer(files, config=make_config(files, owner=owner), owner=owner)

    return load


def _read(reader: LanguageReader, entries: Iterable[FileEntry]) -> dict[str, bytes]:
    return {entry.name: read_file(reader.store, entry) for entry in entries}
