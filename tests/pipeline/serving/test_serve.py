"""The Ray Serve application: its arguments, and what a replica serves."""

from __future__ import annotations

from typing import Any

import pytest
from fake_composite import FakeComposite
from http_server import running
from pydantic import ValidationError

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.serving import application, served_builds

serve = pytest.importorskip("mmerge.pipeline.serving.serve")
BUILD = "ab" * 32


def test_arguments_are_checked_before_a_replica_starts() -> None:
    with pytest.raises(ValidationError, match="devcie"):
        serve.make_app({"uri": "store", "devcie": "cuda"})
    with pytest.raises(ValidationError, match="max_batch"):
        serve.make_app({"uri": "store", "max_batch": 0})
    assert serve.make_app({"uri": "store#omni"}) is not None


def test_a_replica_serves_the_protocol_with_the_key_of_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_builds, "open_reference", lambda uri: (None, BUILD, None))
    monkeypatch.setattr(served_builds, "open_build", lambda uri: (None, BUILD))
    loads: list[dict[str, Any]] = []

    def load(uri: str, **options: Any) -> Any:
        loads.append({"uri": uri} | options)
        return FakeComposite()

    monkeypatch.setattr(application, "load_composite", load)
    monkeypatch.setenv("MMERGE_API_KEY", "k" * 20)
    app = serve.make_app({"uri": "store#omni", "device": "cuda", "dtype": "float16"})
    wrapper = app._bound_deployment.func_or_class
    build = next(
        cell.cell_contents
        for cell in wrapper.__init__.__closure__
        if getattr(cell.cell_contents, "__name__", "") == "build"
    )
    body = {"model": BUILD[:12], "messages": [{"role": "user", "content": "hello"}]}
    monkeypatch.delenv("MMERGE_API_KEY")
    with pytest.raises(MmergeError, match="MMERGE_API_KEY is not set where the replicas run"):
        build()
    monkeypatch.setenv("MMERGE_API_KEY", "k" * 20)
    with running(build()) as server:
        assert server.ask(body).status == 401
        reply = server.ask(body, headers={"authorization": "Bearer " + "k" * 20})
    assert reply.json["choices"][0]["message"]["content"] == "hello"
    assert loads[0]["uri"] == f"store#{BUILD}"
    assert loads[0]["device"] == "cuda"
