"""A composite without a model: its answers tell which prompt they belong to."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mmerge.manifests.errors import PromptError
from mmerge.workers.modalities.prompt import Part

END = 0
CONTEXT = 4000


class Tokenizer:
    """One token per character; 0 is the end."""

    eos_token_id = END

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens if token != END)


def describe(parts: Sequence[Part]) -> str:
    """Return the answer to a prompt: its text, and a digest of each medium, in order."""
    pieces = []
    for part in parts:
        if part.kind == "text":
            pieces.append(str(part.value))
        else:
            data = Path(part.value).read_bytes()
            pieces.append(f"<{part.kind} {hashlib.sha256(data).hexdigest()[:8]}>")
    return "".join(pieces)


class FakeComposite:
    """Answers with a description of the prompt, one character per step."""

    def __init__(self, build: str = "ab" * 32, *, step_s: float = 0.0) -> None:
        self.manifest = SimpleNamespace(
            build=build, experts=[SimpleNamespace(name="image"), SimpleNamespace(name="audio")]
        )
        self.tokenizer = Tokenizer()
        self.turn = threading.RLock()
        self.context_tokens = CONTEXT
        self.batches: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.step_s = step_s
        self.prefix = ""
        self.gate = threading.Event()
        """Generations wait for it."""
        self.gate.set()
        self.began = threading.Event()
        self.num_steps = 0

    def prompt(self, question: Sequence[Part], media: Sequence[Part] = ()) -> list[Part]:
        return list(question)

    def embed(self, parts: Sequence[Part]) -> Any:
        text = describe(parts)
        if "unreadable" in text:
            path = next((part.value for part in parts if part.kind != "text"), "it")
            raise PromptError(f"{path}: cannot be read")
        if "broken" in text:
            raise ZeroDivisionError("a fault")
        return SimpleNamespace(text=self.prefix + text, ids=torch.zeros(len(text)))

    def check_length(self, num_tokens: int, max_new_tokens: int) -> None:
        if num_tokens + max_new_tokens > CONTEXT:
            raise PromptError(f"{num_tokens} + {max_new_tokens} tokens are too many")

    def generate_rows(
        self,
        embedded: Sequence[Any],
        receivers: Sequence[Callable[[int], bool]],
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> None:
        self.batches.append(len(embedded))
        self.options.append(options)
        self.began.set()
        assert self.gate.wait(30)
        answers = [[*map(ord, prompt.text), END] for prompt in embedded]
        alive = [True] * len(answers)
        for step in range(max_new_tokens):
            time.sleep(self.step_s)
            self.num_steps += 1
            for row, answer in enumerate(answers):
                if alive[row] and step < len(answer):
                    alive[row] = receivers[row](answer[step]) and answer[step] != END
            if not any(alive):
                return
