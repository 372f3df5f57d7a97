"""A composite as a Ray Serve application over HTTP, run by `infra/kubernetes/base/service`.

A request is JSON: `{"question": "…", "media": [{"kind": "image", "data": "<base64 of a file>"}],
"max_new_tokens": 64}`; the answer is `{"answer": "…", "build": "…"}`, or with status 400 `{"error":
"…"}`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from mmerge.manifests.errors import MmergeError, PromptError
from mmerge.workers.composite.loader import load_composite
from mmerge.workers.modalities.prompt import Part


class Arguments(BaseModel):
    """The `args` of the application."""

    model_config = ConfigDict(extra="forbid")

    uri: str
    """The composite, STORE#NAME; resolved once, when a replica starts."""
    device: str = "cpu"
    expert: str | None = None
    """Reconstruct this expert alone, instead of routing by modality."""


class Medium(BaseModel):
    """One file of a request."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    data: str


class Question(BaseModel):
    """One request."""

    model_config = ConfigDict(extra="forbid")

    question: str = ""
    media: list[Medium] = Field(default_factory=list)
    max_new_tokens: int = Field(64, ge=1, le=4096)


class Answerer:
    """A loaded composite that answers requests, independent of Ray.

    One thread answers, one request after the other. So a request whose client has left keeps its
    turn until its work has ended, and a next one cannot begin before that.
    """

    def __init__(self, arguments: Arguments) -> None:
        mode: Any = "retention" if arguments.expert else "expansion"
        self._composite = load_composite(
            arguments.uri, mode=mode, expert=arguments.expert, device=arguments.device
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmerge-answer")

    async def answer_in_turn(self, raw: object) -> dict[str, str]:
        """Return the answer to a request once those before it are answered, see `answer`.

        Cancelling a request that waits removes it; one that has begun ends unseen.
        """
        return await asyncio.wrap_future(self._thread.submit(self.answer, raw))

    def answer(self, raw: object) -> dict[str, str]:
        """Return the answer to a request. Raises PromptError if it is malformed or unanswerable."""
        try:
            asked = Question.model_validate(raw)
        except ValidationError as error:
            messages = [
                f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
            ]
            raise PromptError("; ".join(messages)) from None
        with tempfile.TemporaryDirectory() as folder:
            parts = [
                _to_part(medium, Path(folder) / str(index))
                for index, medium in enumerate(asked.media)
            ]
            prompt = self._composite.prompt(asked.question, parts)
            text = self._composite.generate(prompt, max_new_tokens=asked.max_new_tokens)
        return {"answer": text, "build": self._composite.manifest.build}


def _to_part(medium: Medium, path: Path) -> Part:
    try:
        path.write_bytes(base64.b64decode(medium.data, validate=True))
    except binascii.Error as error:
        raise PromptError(f"media: {medium.kind} is not base64 ({error})") from None
    return Part(medium.kind, path)


@serve.deployment
class CompositeServer:
    """One replica: answers one request at a time, in the order of their arrival."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._answerer = Answerer(Arguments.model_validate(arguments))

    async def __call__(self, request: Any) -> Any:
        """Return the answer as JSON."""
        from starlette.responses import JSONResponse

        try:
            raw = await request.json()
        except ValueError:
            return JSONResponse({"error": "the body is not JSON"}, status_code=400)
        try:
            return JSONResponse(await self._answerer.answer_in_turn(raw))
        except MmergeError as error:
            return JSONResponse({"error": str(error)}, status_code=400)


def make_app(args: dict[str, Any]) -> Any:
    """Return the application.

    Raises:
        ValidationError: `args` do not fit `Arguments`; raised before a replica starts.
    """
    deployment: Any = CompositeServer  # what the decorator makes of the class
    return deployment.bind(Arguments.model_validate(args).model_dump())
