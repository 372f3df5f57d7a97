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

    A single message of the user gets the templates of the recipe or of a chat, like a question of
    `mmerge generate`. Its text is taken as it is: places such as `{image}` mean nothing in it.

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
    return composite.prompt(conversation[0][1])
