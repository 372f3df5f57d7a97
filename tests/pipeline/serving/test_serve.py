"""The serving application, without a cluster: requests in, answers out, what cannot be answered is
named.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from mmerge.manifests.errors import PromptError

serve = pytest.importorskip("mmerge.pipeline.serving.serve")


@pytest.fixture
def answerer(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Composite:
        manifest = SimpleNamespace(build="ab" * 32)

        def prompt(self, question: str, media: Any) -> Any:
            return question, [(part.kind, part.value.read_bytes()) for part in media]

        def generate(self, prompt: Any, *, max_new_tokens: int) -> str:
            return f"{prompt} {max_new_tokens}"

    def load(uri: str, *, mode: str, expert: str | None, device: str) -> Any:
        assert (uri, mode, expert, device) == ("store#omni", "expansion", None, "cpu")
        return Composite()

    monkeypatch.setattr(serve, "load_composite", load)
    return serve.Answerer(serve.Arguments(uri="store#omni"))


def test_a_question_with_a_medium_is_answered_with_the_builds_digest(answerer: Any) -> None:
    media = [{"kind": "image", "data": base64.b64encode(b"png").decode()}]
    found = answerer.answer({"question": "what?", "media": media, "max_new_tokens": 5})
    assert found == {"answer": "('what?', [('image', b'png')]) 5", "build": "ab" * 32}


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"questoin": "x"}, "questoin"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"media": [{"kind": "image", "data": "?"}]}, "image is not base64"),
    ],
)
def test_what_cannot_be_answered_is_named(answerer: Any, request_: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        answerer.answer(request_)


def test_arguments_are_checked_before_a_replica_starts() -> None:
    with pytest.raises(ValidationError, match="devcie"):
        serve.make_app({"uri": "store", "devcie": "cuda"})
    assert serve.make_app({"uri": "store#omni"}) is not None


class SlowComposite:
    """Encodes and answers in two slow steps, over state that requests must not share."""

    manifest = SimpleNamespace(build="ab" * 32)

    def __init__(self) -> None:
        self.log: list[str] = []
        self.began = threading.Event()
        self.may_go_on = threading.Event()
        self._encoded = ""

    def prompt(self, question: str, media: Any) -> str:
        return question

    def generate(self, prompt: str, *, max_new_tokens: int) -> str:
        self.log.append(f"begin {prompt}")
        self._encoded = prompt
        self.began.set()
        assert self.may_go_on.wait(timeout=30)
        if prompt == "bad":
            raise PromptError("bad prompt")
        self.log.append(f"end {prompt}")
        return f"answer to {self._encoded}"


class Request:
    """A request as Ray Serve passes it on."""

    def __init__(self, question: str) -> None:
        self._question = question

    async def json(self) -> Any:
        return {"question": self._question}


@pytest.fixture
def slow_server(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, SlowComposite]:
    composite = SlowComposite()
    monkeypatch.setattr(serve, "load_composite", lambda uri, **_: composite)
    return serve.CompositeServer.func_or_class({"uri": "store"}), composite


async def ask(server: Any, question: str) -> dict[str, str]:
    response = await server(Request(question))
    body: dict[str, str] = json.loads(response.body)
    return body


@pytest.mark.parametrize("question", ["first", "bad"])
def test_a_request_whose_client_leaves_keeps_its_turn_until_its_work_has_ended(
    slow_server: tuple[Any, SlowComposite], question: str
) -> None:
    server, composite = slow_server

    async def leave_and_ask() -> dict[str, str]:
        first = asyncio.create_task(ask(server, question))
        await asyncio.to_thread(composite.began.wait, 30)
        first.cancel()
        second = asyncio.create_task(ask(server, "second"))
        await asyncio.sleep(0.05)
        assert composite.log == [f"begin {question}"], "the turn was given away"
        composite.may_go_on.set()
        return await second

    assert asyncio.run(leave_and_ask())["answer"] == "answer to second"
    assert composite.log[-2:] == ["begin second", "end second"]


def test_a_request_whose_client_leaves_while_it_waits_is_not_answered(
    slow_server: tuple[Any, SlowComposite],
) -> None:
    server, composite = slow_server

    async def leave_early() -> list[dict[str, str]]:
        first = asyncio.create_task(ask(server, "first"))
        await asyncio.to_thread(composite.began.wait, 30)
        second = asyncio.create_task(ask(server, "second"))
        third = asyncio.create_task(ask(server, "third"))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        composite.may_go_on.set()
        return [await first, await third]

    answers = asyncio.run(leave_early())
    assert [body["answer"] for body in answers] == ["answer to first", "answer to third"]
    assert composite.log == ["begin first", "end first", "begin third", "end third"]


def test_an_error_of_one_request_reaches_its_own_client(
    slow_server: tuple[Any, SlowComposite],
) -> None:
    server, composite = slow_server
    composite.may_go_on.set()

    async def ask_all() -> list[dict[str, str]]:
        return await asyncio.gather(*(ask(server, text) for text in ("good", "bad", "fine")))

    good, bad, fine = asyncio.run(ask_all())
    assert (good["answer"], bad["error"], fine["answer"]) == (
        "answer to good",
        "PromptError: bad prompt",
        "answer to fine",
    )
