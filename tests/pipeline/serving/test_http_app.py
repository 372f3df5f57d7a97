"""OpenAI's protocol over HTTP: answers, streams, models, and refusals, with a fake composite."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_composite import FakeComposite
from http_server import TestServer, running

from mmerge.manifests.errors import StoreUnavailable
from mmerge.pipeline.serving import served_builds
from mmerge.pipeline.serving.http_app import make_http_app
from mmerge.pipeline.serving.scheduler import BatchSettings, Scheduler
from mmerge.pipeline.serving.served_builds import ServedBuilds
from mmerge.pipeline.serving.server_metrics import ServerMetrics

KEY = "k" * 20
BUILD, NEWER = "ab" * 32, "cd" * 32
PNG = b"\x89PNG any bytes"


class World:
    """A store of one name, what loading gives, and the server over it."""

    def __init__(self) -> None:
        self.latest = BUILD
        self.composites: dict[tuple[str, str | None], FakeComposite] = {}
        self.failure: Exception | None = None
        self.loads: list[tuple[str, str | None]] = []
        self.builds: ServedBuilds
        self.server: TestServer

    def resolve(self, uri: str) -> tuple[Any, str, None]:
        if self.failure:
            raise self.failure
        return None, self.latest, None

    def load(self, uri: str, *, expert: str | None, reuse: Any) -> Any:
        build = uri.partition("#")[2]
        self.loads.append((build, expert))
        composite = FakeComposite(build)
        composite.prefix = f"{expert}: " if expert else ""
        return self.composites.setdefault((build, expert), composite)

    @property
    def composite(self) -> FakeComposite:
        return self.composites[(self.latest, None)]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url, api_key=key, max_retries=0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(served_builds, "open_reference", made.resolve)
    monkeypatch.setattr(served_builds, "open_build", lambda uri: made.resolve(uri)[:2])
    metrics = ServerMetrics()
    made.builds = ServedBuilds("store#omni", load=made.load, metrics=metrics, name="omni")
    scheduler = Scheduler(BatchSettings(max_queue=8, max_batch=4), metrics=metrics)
    app = make_http_app(made.builds, scheduler, metrics=metrics, keys=[KEY])
    with running(app) as server:
        made.server = server
        yield made


def say(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes = PNG) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def ask(world: World, body: Any, **changes: Any) -> Any:
    request = {"model": "omni", "messages": [say(body) if isinstance(body, str) else body]}
    return world.server.ask(request | changes, headers={"authorization": f"Bearer {KEY}"})


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def test_a_question_is_answered_as_openais_client_expects_it(world: World) -> None:
    raw = world.client().chat.completions.with_raw_response.create(
        model="omni", messages=[say("hello")]
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
    assert answer.system_fingerprint == raw.headers["x-mmerge-build"] == BUILD


def test_a_stream_gives_the_same_answer_in_pieces(world: World) -> None:
    stream = world.client().chat.completions.create(
        model="omni",
        messages=[say("hello")],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=4,
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == "hell"
    assert len(pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 5 + 4


def test_media_reach_the_composite_in_the_order_of_the_message(world: World) -> None:
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(b"wav").decode(), "format": "wav"},
    }
    video = {"type": "video_url", "video_url": {"url": data_url(b"gif", "image/gif")}}
    cloud = {
        "type": "media_url",
        "media_url": {"kind": "point", "url": data_url(b"npy", "application/octet-stream")},
    }
    body = say(image(), sound, video, cloud, text("what?"))
    expected = (
        f"<image {digest(PNG)}><audio {digest(b'wav')}><video {digest(b'gif')}>"
        f"<point {digest(b'npy')}>what?"
    )
    assert ask(world, body).json["choices"][0]["message"]["content"] == expected
    between = say(text("a"), image(b"1"), text("b"), image(b"2"), text("c"))
    expected = f"a<image {digest(b'1')}>b<image {digest(b'2')}>c"
    assert ask(world, between).json["choices"][0]["message"]["content"] == expected


def test_the_composite_and_each_expert_are_models(world: World) -> None:
    client = world.client()
    assert [model.id for model in client.models.list()] == ["omni", "omni/image", "omni/audio"]
    assert client.models.retrieve("omni/image").id == "omni/image"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")
    for name in ("omni/image", "omni/audio", "omni/audio", "omni/image"):
        answer = client.chat.completions.create(model=name, messages=[say("x")])
        assert answer.choices[0].message.content == f"{name[5:]}: x"
        assert answer.model == name
    loads = [(BUILD, None), (BUILD, "image"), (BUILD, "audio"), (BUILD, "image")]
    assert world.loads == loads, "one rebuilt expert is in memory at once"
    with pytest.raises(openai.NotFoundError, match="There are omni, omni/image, omni/audio"):
        client.chat.completions.create(model="omni/smell", messages=[say("x")])


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "k", "é" * 20])
def test_without_the_key_nothing_is_answered(world: World, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".encode().decode("latin-1")} if key else {}
    for reply in (
        world.server.ask({"model": "omni", "messages": [say("x")]}, headers=headers),
        world.server.request("GET", "/v1/models", headers=headers),
        world.server.request("GET", "/nowhere", headers=headers),
    ):
        assert reply.status == 401
        assert reply.json["error"]["code"] == "invalid_api_key"
    assert world.composite.batches == []
    assert world.server.request("GET", "/health").json["build"] == BUILD
    assert b"mmerge_serve_queued" in world.server.request("GET", "/metrics").body


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "unknown role": ({"messages": [say("x", role="tool")]}, r"messages\[0\].role"),
    "a conversation": (
        {"messages": [say("x"), say("y", role="assistant"), say("z")]},
        "got user, assistant, user",
    ),
    "text as number": ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
    "unknown content": (
        {"messages": [say({"type": "smell", "smell": "x"})]},
        r"messages\[0\].content\[0\]",
    ),
    "content of two kinds": (
        {"messages": [say(image() | {"text": "x"})]},
        r"messages\[0\].content\[0\].text: Extra inputs",
    ),
    "no base64": (
        {"messages": [say({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})]},
        r"messages\[0\].content\[0\].image_url.url: is no base64",
    ),
    "an address": (
        {"messages": [say({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})]},
        "Nothing is fetched from other addresses",
    ),
    "a file": (
        {"messages": [say({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]},
        "no file of the server is read",
    ),
    "another type": (
        {
            "messages": [
                say({"type": "image_url", "image_url": {"url": data_url(b"x", "audio/wav")}})
            ]
        },
        "expected a type of image/…, got 'audio/wav'",
    ),
    "text as medium": (
        {
            "messages": [
                say({"type": "media_url", "media_url": {"kind": "ids", "url": data_url(b"x")}})
            ]
        },
        "'ids' is no modality",
    ),
    "many media": ({"messages": [say(*[image()] * 33)]}, "33 media, at most 32"),
    "a speaker's name": ({"messages": [say("x") | {"name": "Ann"}]}, r"messages\[0\].name: Extra"),
    "several answers": ({"n": 2}, "n: is not supported"),
    "tools": ({"tools": [{"type": "function"}]}, "tools: is not supported"),
    "logprobs": ({"logprobs": True}, "logprobs: is not supported"),
    "a typo": ({"temprature": 0.5}, "temprature: is not supported"),
    "negative length": ({"max_tokens": 0}, "max_tokens: Input should be greater"),
    "length twice": ({"max_tokens": 5, "max_completion_tokens": 5}, "Give one of them"),
    "length as text": ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
    "a truth value": ({"temperature": True}, "temperature: Input should be a valid number"),
    "an odd probability": ({"top_p": 1.5}, "top_p: Input should be less"),
    "a seed beyond 64 bits": ({"seed": 1 << 64}, "seed: "),
    "many stop texts": ({"stop": ["a"] * 5}, "stop: give at most 4"),
    "an empty stop text": ({"stop": ""}, "stop: give at most 4"),
    "too long": ({"max_tokens": 5000}, "1 [+] 5000 tokens are too many"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(world: World, name: str) -> None:
    changes, message = REFUSED[name]
    reply = ask(world, "x", **changes)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert openai_like(reply.json)
    assert re.search(message, reply.message), reply.message
    assert ask(world, "still there").status == 200


def openai_like(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


def test_parameters_that_ask_for_nothing_are_accepted(world: World) -> None:
    reply = ask(
        world,
        "x",
        n=1,
        user="me",
        metadata={"a": "b"},
        logprobs=False,
        tools=None,
        presence_penalty=0,
        response_format={"type": "text"},
        stop=None,
        temperature=0,
    )
    assert reply.status == 200
    assert world.composite.options == [{}]


def test_options_of_sampling_reach_the_composite(world: World) -> None:
    changes = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7, "min_tokens": 1}
    assert ask(world, "x", **changes).status == 200
    assert world.composite.options == [
        {
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 0,
            "seed": 7,
            "min_new_tokens": 1,
        }
    ]


def test_an_input_that_cannot_be_read_is_named_without_a_path(world: World) -> None:
    reply = ask(world, say(image(), text("unreadable")))
    assert reply.status == 400
    assert reply.message == "messages[0].content[0].image_url: cannot be read"


def test_a_fault_of_the_server_tells_no_more_than_its_number(world: World) -> None:
    reply = ask(world, "broken")
    assert reply.status == 500
    assert "a fault" not in reply.body.decode()
    assert "chatcmpl-" in reply.message
    streamed = ask(world, "broken", stream=True)
    assert streamed.status == 500
    assert ask(world, "x").status == 200


def test_a_full_queue_is_told_with_429(world: World) -> None:
    composite = world.composite
    composite.gate.clear()
    replies: list[Any] = []
    threads = [
        threading.Thread(target=lambda: replies.append(ask(world, "x").status)) for _ in range(14)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while 429 not in replies and time.monotonic() < deadline:
        time.sleep(0.01)
    late = ask(world, "late")
    composite.gate.set()
    for thread in threads:
        thread.join(30)
    assert late.status == 429
    assert late.headers["retry-after"] == "1"
    assert late.json["error"]["type"] == "rate_limit_error"
    assert set(replies) == {200, 429}
    assert replies.count(200) >= 8


def test_thirty_two_clients_get_their_own_answers(world: World) -> None:
    wrong: list[Any] = []

    def talk(client: int) -> None:
        for turn in range(6):
            words = f"client {client} turn {turn}"
            data = words.encode()
            body = say(image(data), text(words))
            while (reply := ask(world, body)).status == 429:
                time.sleep(0.01)
            expected = f"<image {digest(data)}>{words}"
            if reply.json["choices"][0]["message"]["content"] != expected:
                wrong.append(reply)

    threads = [threading.Thread(target=talk, args=(client,)) for client in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert max(world.composite.batches) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_and_changes_no_answer(
    world: World, stream: bool
) -> None:
    composite = world.composite
    composite.gate.clear()
    body = json.dumps(
        {"model": "omni", "messages": [say("x" * 900)], "stream": stream, "max_tokens": 1000}
    ).encode()
    for _ in range(12):
        connection = http.client.HTTPConnection("127.0.0.1", world.server.port)
        connection.request("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {KEY}"})
        assert composite.began.wait(20)
        connection.close()
        time.sleep(0.02)
    composite.gate.set()
    assert ask(world, "mine").json["choices"][0]["message"]["content"] == "mine"
    assert composite.num_steps < 3 * 900
    assert b'status="499"' in world.server.request("GET", "/metrics").body


def test_a_newer_build_takes_over_and_running_answers_end_on_the_old_one(world: World) -> None:
    old = world.composite
    old.gate.clear()
    replies: list[Any] = []
    thread = threading.Thread(target=lambda: replies.append(ask(world, "running")))
    thread.start()
    assert old.began.wait(20)
    assert not world.builds.refresh()
    world.latest = NEWER
    assert world.builds.refresh()
    old.gate.set()
    thread.join(20)
    assert replies[0].headers["x-mmerge-build"] == BUILD
    assert replies[0].json["choices"][0]["message"]["content"] == "running"
    assert ask(world, "x").json["system_fingerprint"] == NEWER
    assert ask(world, "x", model="omni/image").json["system_fingerprint"] == NEWER
    assert f'build="{NEWER}"'.encode() in world.server.request("GET", "/metrics").body


def test_a_build_that_cannot_be_loaded_leaves_the_old_one_serving(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.failure = StoreUnavailable("s3://bucket: no answer")
    assert not world.builds.refresh()
    assert "s3://bucket: no answer" in caplog.text
    assert ask(world, "x").json["system_fingerprint"] == BUILD
    assert b'swaps_total{result="failed"} 1.0' in world.server.request("GET", "/metrics").body
    world.failure = None
    world.latest = NEWER
    assert world.builds.refresh()


def test_no_request_is_lost_while_builds_change(world: World) -> None:
    statuses: list[tuple[int, bool]] = []
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            reply = ask(world, "x")
            build = reply.headers.get("x-mmerge-build")
            statuses.append((reply.status, build in (BUILD, NEWER)))

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        world.latest = NEWER if turn % 2 == 0 else BUILD
        assert world.builds.refresh()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert set(statuses) == {(200, True)}


def test_other_paths_and_methods_have_errors_of_the_same_shape(world: World) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        reply = world.server.request(method, path, headers=headers)
        assert reply.status == status
        assert openai_like(reply.json)
