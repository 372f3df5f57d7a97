"""A server under attack: slow clients, large and malformed bodies, files that are bombs."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_composite import FakeComposite
from http_server import TestServer, running
from PIL import Image

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.serving import served_builds
from mmerge.pipeline.serving.door import read_keys
from mmerge.pipeline.serving.http_app import make_http_app
from mmerge.pipeline.serving.scheduler import BatchSettings, Scheduler
from mmerge.pipeline.serving.served_builds import ServedBuilds
from mmerge.pipeline.serving.server import check_address
from mmerge.pipeline.serving.server_metrics import ServerMetrics
from mmerge.workers.modalities.media_files import read_array, read_audio, read_image, read_video

BUILD = "ab" * 32


class ReadingComposite(FakeComposite):
    """Decodes the media of a prompt as encoders do."""

    def embed(self, parts: Any) -> Any:
        for part in parts:
            if part.kind == "image":
                read_image(part.value)
            if part.kind == "audio":
                read_audio(part.value, sampling_rate=16_000)
            if part.kind == "video":
                read_video(part.value)
            if part.kind == "point":
                read_array(part.value, what="features", remedy="Give others")
        return super().embed(parts)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestServer]:
    monkeypatch.setattr(served_builds, "open_reference", lambda uri: (None, BUILD, None))
    monkeypatch.setenv("MMERGE_MAX_REQUEST_SECONDS", "2")
    monkeypatch.setenv("MMERGE_MAX_REQUEST_BYTES", str(8 << 20))
    metrics = ServerMetrics()

    def load(uri: str, *, expert: str | None, reuse: Any) -> Any:
        return ReadingComposite()

    builds = ServedBuilds("store#omni", load=load, metrics=metrics, name="omni")
    scheduler = Scheduler(BatchSettings(), metrics=metrics)
    with running(make_http_app(builds, scheduler, metrics=metrics)) as made:
        yield made


def body_of(*content: Any) -> dict[str, Any]:
    return {"model": "omni", "messages": [{"role": "user", "content": list(content)}]}


def medium(kind: str, data: bytes) -> dict[str, Any]:
    url = "data:;base64," + base64.b64encode(data).decode()
    if kind == "audio":
        encoded = base64.b64encode(data).decode()
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    if kind == "point":
        return {"type": "media_url", "media_url": {"kind": kind, "url": url}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def is_alive(server: TestServer) -> bool:
    return server.ask(body_of({"type": "text", "text": "x"})).status == 200


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ch", HEAD, HEAD + b"\r\n{"])
def test_slow_clients_are_closed_and_hold_up_nobody(server: TestServer, sent: bytes) -> None:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            for _ in range(40)
        ]
        for client in clients:
            client.sendall(sent)
        began = time.monotonic()
        assert is_alive(server)
        assert time.monotonic() - began < 2
        for client in clients:
            client.settimeout(15)
            answer = client.recv(1 << 16)
            assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0]


def test_a_byte_per_second_does_not_extend_the_time(server: TestServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(15)
        client.sendall(HEAD + b"\r\n")
        began = time.monotonic()
        done = threading.Event()

        def drip() -> None:
            while not done.wait(0.3):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = client.recv(1 << 16)
        done.set()
        thread.join()
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - began < 10


def test_a_large_body_is_refused_before_it_is_read(server: TestServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(15)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n"
        client.sendall(head)
        assert b" 413 " in client.recv(1 << 16).split(b"\r\n")[0]
    assert is_alive(server)


def count_sent(client: socket.socket, chunk: bytes, *, at_most: int) -> int:
    """Return how often a chunk can be sent until the connection is closed."""
    for count in range(at_most):
        try:
            client.sendall(chunk)
        except OSError:
            return count
    return at_most


def test_a_large_body_of_unknown_length_is_refused_within_the_limit(server: TestServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(15)
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        assert count_sent(client, chunk, at_most=200) < 100
    assert is_alive(server)


START = b'{"model": "omni", "messages": [{"role": "user", "content": "x"}]'
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "half": START,
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"messages":' * 100_000,
    "deep value": START + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[]",
    "a lone surrogate": START.replace(b'"x"', b'"\\ud800"') + b"}",
    "no UTF-8": START.replace(b'"x"', b'"\xff\xfe"') + b"}",
    "a huge number": START + b', "max_tokens": ' + b"9" * 5000 + b"}",
    "NaN": START + b', "top_p": NaN}',
    "a long model": START.replace(b"omni", b"x" * 1_000_000) + b"}",
    "a long parameter": START + b', "' + b"x" * 1_000_000 + b'": 1}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused_quickly(server: TestServer, name: str) -> None:
    began = time.monotonic()
    reply = server.ask(BODIES[name])
    assert reply.status in (400, 404)
    assert len(reply.body) < 2000
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - began < 5
    assert is_alive(server)


def make_png(width: int, height: int) -> bytes:
    out = BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def make_gif(frames: int, size: int) -> bytes:
    out = BytesIO()
    images = [Image.new("L", (size, size), index % 251) for index in range(frames)]
    images[0].save(out, "GIF", save_all=True, append_images=images[1:])
    return out.getvalue()


def make_npy_head(shape: tuple[int, ...]) -> bytes:
    out = BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def make_wav_head(num_bytes: int) -> bytes:
    def word(value: int, size: int = 4) -> bytes:
        return value.to_bytes(size, "little")

    form = word(1, 2) + word(1, 2) + word(16_000) + word(32_000) + word(2, 2) + word(16, 2)
    chunks = b"WAVEfmt " + word(16) + form + b"data" + word(num_bytes)
    return b"RIFF" + word(36 + num_bytes) + chunks


BOMBS: dict[str, tuple[str, Any]] = {
    "PNG of 10^9 pixels": ("image", lambda: make_png(40_000, 25_000)),
    "PNG that is a line": ("image", lambda: make_png(100_000, 1)),
    "PostScript": ("image", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "SVG": ("image", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "text as image": ("image", lambda: b"hello"),
    "empty image": ("image", lambda: b""),
    "GIF of 700 frames": ("video", lambda: make_gif(700, 8)),
    "WAV that announces 2 GB": ("audio", lambda: make_wav_head(2_000_000_000)),
    "text as sound": ("audio", lambda: b"hello"),
    "array of 10^10": ("point", lambda: make_npy_head((10**5, 10**5))),
    "array of negative size": ("point", lambda: make_npy_head((-1, 3))),
    "pickled array": ("point", lambda: b"\x80\x04\x95"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_is_a_bomb_is_refused_in_bounded_memory(server: TestServer, name: str) -> None:
    kind, make = BOMBS[name]
    body = body_of(medium(kind, make()), {"type": "text", "text": "what?"})
    tracemalloc.start()
    began = time.monotonic()
    reply = server.ask(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reply.status == 400, reply.body
    assert time.monotonic() - began < 10
    assert peak < 200 << 20
    assert reply.message.startswith("messages[0].content[0].")
    assert "/tmp" not in reply.message
    assert is_alive(server)


def test_five_hundred_media_are_refused_before_any_is_decoded(server: TestServer) -> None:
    reply = server.ask(body_of(*[medium("image", make_png(4, 4))] * 500))
    assert reply.status == 400
    assert "500 media, at most 32" in reply.message


SECRET = "the text of a file that nobody asked for"


@pytest.mark.parametrize(
    "url",
    [
        "file://{path}",
        "{path}",
        "data:image/png;base64,../../{path}",
        "FILE://localhost{path}",
        "data:file://{path}",
        "http://127.0.0.1:1/{path}",
        "\x00{path}",
    ],
)
@pytest.mark.parametrize("kind", ["image", "video", "point"])
def test_no_field_reads_a_file_of_the_server(
    server: TestServer, tmp_path: Path, url: str, kind: str
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_text(SECRET)
    content = medium(kind, b"x")
    fields = content[next(key for key in content if key.endswith("_url"))]
    fields["url"] = url.format(path=secret)
    reply = server.ask(body_of(content, {"type": "text", "text": "what?"}))
    assert reply.status == 400
    assert SECRET not in reply.body.decode()


def test_placeholders_that_are_typed_stay_text(server: TestServer) -> None:
    words = "<image> {image} <|image_pad|> </s> {media} {text}"
    reply = server.ask(body_of({"type": "text", "text": words}))
    assert reply.json["choices"][0]["message"]["content"] == words


def test_a_server_that_strangers_reach_needs_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMERGE_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        check_address(host, (), is_open=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(MmergeError, match="no API key is set"):
            check_address(host, (), is_open=False)
        check_address(host, ("k" * 20,), is_open=False)
        check_address(host, (), is_open=True)
    assert read_keys(None) == ()
    monkeypatch.setenv("MMERGE_API_KEY", "e" * 16)
    assert read_keys(None) == ("e" * 16,)
    file = tmp_path / "keys"
    file.write_text(f"{'a' * 16}\n\n  {'b' * 32}\n")
    assert read_keys(file) == ("a" * 16, "b" * 32)
    for text in ("", "short\n", "é" * 20):
        file.write_text(text)
        with pytest.raises(MmergeError, match="at least 16 ASCII characters"):
            read_keys(file)
    with pytest.raises(MmergeError, match="cannot be read"):
        read_keys(tmp_path / "nowhere")


def test_keys_are_not_told_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("tooshort")
    with pytest.raises(MmergeError) as caught:
        read_keys(file)
    assert "tooshort" not in str(caught.value)
    assert json.dumps(str(caught.value))
