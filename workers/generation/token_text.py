"""Text of an answer while its tokens arrive one by one."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes to where the bytes of a character are not complete yet."""


class TokenText:
    """Decodes an answer piece by piece; the pieces joined are the stripped text of all its tokens.

    Text is held back while its last character is incomplete, or while it ends in white space, which
    is removed at the end of an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        """Index of the first token that is decoded again with each new one."""
        self._end = 0
        """Index behind the last token whose text was returned."""
        self._held = ""
        self._has_begun = False

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def push(self, token: int) -> str:
        """Add a token and return the text that it completes, often empty."""
        self._tokens.append(token)
        before, text = self._decode(self._end), self._decode(len(self._tokens))
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        # Decoded with the piece before it: some tokenizers drop a space at the start of a text.
        self._start, self._end = self._end, len(self._tokens)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """Return the text that was held back because its last character is incomplete."""
        rest = self._decode(len(self._tokens))[len(self._decode(self._end)) :]
        self._start = self._end = len(self._tokens)
        return self._release(rest)

    def _decode(self, end: int) -> str:
        tokens = self._tokens[self._start : end]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, piece: str) -> str:
        text = self._held + piece
        if not self._has_begun:
            text = text.lstrip()
        stripped = text.rstrip()
        self._held = text[len(stripped) :]
        self._has_begun = self._has_begun or bool(stripped)
        return stripped
