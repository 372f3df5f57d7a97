"""Conversations as prompts of a composite."""

from __future__ import annotations

from collections.abc import Sequence

from mmerge.pipeline.serving.api_errors import ApiError
from mmerge.workers.composite.model import Composite
from mmerge.workers.modalities.prompt import Part


def make_chat_prompt(
    composite: Composite, conversation: Sequence[tuple[str, Sequence[Part]]]
) -> list[Part]:
    """Return the parts of the prompt that a conversation of (role, parts) makes.

    A single message of the user gets the recipe's templates, like a question of `mmerge generate`.
    Media before or behind all text go where the template has them; media between texts stay there,
    without templates.

    Raises:
        ApiError: 400; the conversation has other messages than one of the user.
        PromptError: as of `Composite.prompt`.
    """
    roles = [role for role, _ in conversation]
    if roles != ["user"]:
        raise ApiError(
            400,
            f"messages: this model answers one message of the user, got {', '.join(roles[:10])}."
            " It was not trained on conversations that its recipe has a template for",
            param="messages",
        )
    parts = [part for part in conversation[0][1] if part.kind != "text" or part.value]
    media = [part for part in parts if part.kind != "text"]
    texts = [index for index, part in enumerate(parts) if part.kind == "text"]
    is_one_block = not texts or texts[-1] - texts[0] == len(texts) - 1
    if not is_one_block:
        return parts
    return composite.prompt("".join(parts[index].value for index in texts), media)
