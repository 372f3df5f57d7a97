"""The serving application, without a cluster: requests in, answers out, what cannot be answered is
named.
"""

from __future__ import annotations

import base64
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
