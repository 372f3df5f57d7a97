"""The HTTP application of a server: OpenAI's chat protocol, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mmerge.manifests.errors import PromptError
from mmerge.pipeline.serving.answer_job import (
    AnswerJob,
    Event,
    Failed,
    Finished,
    Piece,
    Started,
)
from mmerge.pipeline.serving.api_errors import ApiError
from mmerge.pipeline.serving.chat_prompt import make_chat_prompt
from mmerge.pipeline.serving.chat_request import ChatRequest, parse_request
from mmerge.pipeline.serving.door import Door
from mmerge.pipeline.serving.request_media import MediaFolder, read_content
from mmerge.pipeline.serving.scheduler import QueueFull, Scheduler
from mmerge.pipeline.serving.served_builds import ServedBuilds, ServedModel
from mmerge.pipeline.serving.server_metrics import ServerMetrics

_log = logging.getLogger(__name__)
OPEN_PATHS = ("/health", "/metrics")
"""What needs no API key: they tell of load and build, not of requests."""
BUILD_HEADER = "x-mmerge-build"
CLIENT_LEFT = 499


@dataclass(eq=False)
class _Answer:
    """A request that is being answered."""

    request: ChatRequest
    model: ServedModel
    job: AnswerJob
    events: asyncio.Queue[Event]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    has_text: bool = False

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens as the protocol has them."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }

    def to_body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the common part of an answer and of its pieces."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.build,
            "choices": choices,
        }


class ChatServer:
    """Answers requests by a scheduler, with the models of `builds`."""

    def __init__(
        self, builds: ServedBuilds, scheduler: Scheduler, *, metrics: ServerMetrics
    ) -> None:
        self._builds, self._scheduler, self._metrics = builds, scheduler, metrics

    async def answer(self, request: Request) -> Response:
        """Return the answer to POST /v1/chat/completions."""
        self._metrics.running.inc()
        status, model, is_stream = 500, "", False
        try:
            asked = await asyncio.to_thread(parse_request, await request.body())
            answer = await self._submit(asked)
            model = answer.model.name
            if asked.stream:
                # The status is known once the prompt is encoded: until then nothing is sent.
                first = await self._next(answer, request)
                is_stream = True
                return StreamingResponse(
                    self._stream(answer, first, request),
                    media_type="text/event-stream",
                    headers={BUILD_HEADER: answer.model.build, "cache-control": "no-cache"},
                )
            body = await self._collect(answer, request)
            status = 200
            return JSONResponse(body, headers={BUILD_HEADER: answer.model.build})
        except ApiError as error:
            status = error.status
            raise
        except ConnectionResetError:
            status = CLIENT_LEFT
            return Response(status_code=CLIENT_LEFT)
        finally:
            if not is_stream:
                self._count(model, status)

    async def _submit(self, asked: ChatRequest) -> _Answer:
        """Queue a request. Raises ApiError."""
        model = await asyncio.to_thread(self._builds.find, asked.model)
        folder = MediaFolder()
        try:
            parts = await asyncio.to_thread(_make_prompt, asked, model, folder)
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[Event] = asyncio.Queue()

            def tell(event: Event) -> None:
                if isinstance(event, Failed) and isinstance(event.error, PromptError):
                    message = folder.hide_paths(Exception.__str__(event.error))
                    event = Failed(ApiError(400, message, param="messages"))
                with suppress(RuntimeError):  # the loop has ended, with all who waited
                    loop.call_soon_threadsafe(events.put_nowait, event)

            job = AnswerJob(
                model=model,
                parts=parts,
                tell=tell,
                max_new_tokens=asked.max_new_tokens,
                options=asked.to_options(),
                stops=asked.stops,
                on_end=folder.close,
            )
            self._scheduler.submit(job)
        except QueueFull:
            folder.close()
            raise ApiError(
                429, "the server has as many prompts waiting as it takes. Try again", code="busy"
            ) from None
        except BaseException:
            folder.close()
            raise
        return _Answer(asked, model, job, events)

    async def _next(self, answer: _Answer, request: Request) -> Event:
        """Return the next event of an answer.

        Raises:
            ApiError: there is no answer.
            ConnectionResetError: the client left.
        """
        waiting = asyncio.ensure_future(answer.events.get())
        leaving = asyncio.ensure_future(_await_leaving(request))
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ConnectionResetError
            return self._check(answer, waiting.result())
        except BaseException:
            answer.job.cancel()
            raise
        finally:
            waiting.cancel()
            leaving.cancel()

    def _check(self, answer: _Answer, event: Event) -> Event:
        since = time.monotonic() - answer.job.arrived
        if isinstance(event, Failed):
            if isinstance(event.error, ApiError):
                raise event.error
            _log.error("request %s failed: %r", answer.id, event.error)
            raise ApiError(500, f"the server failed on request {answer.id}; its log has the reason")
        if isinstance(event, Started):
            answer.num_prompt_tokens = event.num_prompt_tokens
            self._metrics.prompt_tokens.inc(event.num_prompt_tokens)
        if isinstance(event, Piece) and not answer.has_text:
            answer.has_text = True
            self._metrics.first_token.observe(since)
        if isinstance(event, Finished):
            answer.num_tokens = event.num_tokens
            self._metrics.answer_tokens.inc(event.num_tokens)
            self._metrics.took.observe(since)
        return event

    async def _collect(self, answer: _Answer, request: Request) -> dict[str, Any]:
        """Return the body of a whole answer."""
        text = ""
        while not isinstance(event := await self._next(answer, request), Finished):
            text += event.text if isinstance(event, Piece) else ""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": event.reason,
        }
        return answer.to_body("chat.completion", [choice]) | {"usage": answer.usage()}

    async def _stream(
        self, answer: _Answer, event: Event, request: Request
    ) -> AsyncIterator[bytes]:
        """Yield the events of a streamed answer, from its first event on."""
        status = CLIENT_LEFT
        options = answer.request.stream_options
        try:
            yield _to_chunk(answer, {"role": "assistant", "content": ""})
            while not isinstance(event, Finished):
                if isinstance(event, Piece):
                    yield _to_chunk(answer, {"content": event.text})
                event = await self._next(answer, request)
            yield _to_chunk(answer, {}, reason=event.reason)
            if options is not None and options.include_usage:
                body = answer.to_body("chat.completion.chunk", []) | {"usage": answer.usage()}
                yield _to_event(body)
            yield b"data: [DONE]\n\n"
            status = 200
        except ApiError as error:
            # The status line is out: the error becomes the last event.
            status = error.status
            yield _to_event(error.to_body())
        except ConnectionResetError:
            return
        finally:
            answer.job.cancel()
            self._count(answer.model.name, status)

    def _count(self, model: str, status: int) -> None:
        self._metrics.running.dec()
        self._metrics.requests.labels(model, str(status)).inc()


def _make_prompt(asked: ChatRequest, model: ServedModel, folder: MediaFolder) -> Sequence[Any]:
    """Return the parts of a prompt, its media written to `folder`. Raises ApiError."""
    conversation = read_content(asked.messages, folder)
    try:
        return make_chat_prompt(model.composite, conversation)
    except PromptError as error:
        message = folder.hide_paths(Exception.__str__(error))
        raise ApiError(400, message, param="messages") from error


async def _await_leaving(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _to_chunk(answer: _Answer, delta: dict[str, Any], *, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _to_event(answer.to_body("chat.completion.chunk", [choice]))


def _to_event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _to_model(name: str, build: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "mmerge",
        "build": build,
    }


def make_http_app(
    builds: ServedBuilds,
    scheduler: Scheduler,
    *,
    metrics: ServerMetrics,
    keys: Sequence[str] = (),
    refresh_s: float | None = None,
) -> Door:
    """Return the ASGI application of a server.

    Args:
        builds: what it answers with.
        scheduler: who answers.
        metrics: shown under /metrics.
        keys: API keys, one of which a request must have; none: everyone may ask.
        refresh_s: seconds between two looks for a newer build; None: never.
    """

    async def follow() -> None:
        while refresh_s is not None:
            await asyncio.sleep(refresh_s)
            try:
                await asyncio.to_thread(builds.refresh)
            except Exception:  # noqa: BLE001 - the present build goes on to answer
                _log.exception("looking for a newer build failed")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(follow())
        yield
        following.cancel()
        await asyncio.to_thread(scheduler.close)

    # Without the pages of documentation, whose scripts come from other servers.
    app = FastAPI(title="mmerge", lifespan=lifespan, openapi_url=None)
    server = ChatServer(builds, scheduler, metrics=metrics)

    @app.exception_handler(ApiError)
    async def show_api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.to_body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def show_http_error(request: Request, error: HTTPException) -> Response:
        return await show_api_error(request, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def show_failure(request: Request, error: Exception) -> Response:
        return await show_api_error(request, ApiError(500, "the server failed; its log says why"))

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Response:
        return await server.answer(request)

    @app.get("/v1/models")
    async def list_models() -> Response:
        models = [_to_model(*known) for known in builds.list_models()]
        return JSONResponse({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        for known in builds.list_models():
            if known[0] == name:
                return JSONResponse(_to_model(*known))
        raise ApiError(404, f"model {name[:200]!r} does not exist", code="model_not_found")

    @app.get("/health")
    async def show_health() -> Response:
        main = builds.main
        return JSONResponse({"status": "ok", "model": main.name, "build": main.build})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.to_text(), media_type="text/plain; version=0.0.4")

    return Door(app, keys=keys, open_paths=OPEN_PATHS)
