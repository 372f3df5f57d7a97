"""A real composite behind the protocol answers as `Composite.generate` does, also in batches."""

from __future__ import annotations

import base64
import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from http_server import TestServer, running
from server_process import free_port, wait_for

from mmerge.pipeline import Composite, Part, load_composite
from mmerge.pipeline.serving.application import ServeSettings, make_application

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"
QUESTIONS = {
    "image": "which digit is in the image ?",
    "audio": "which digit is spoken ?",
    "video": "which way does the digit move ?",
}
TYPES = {"image": "image/png", "video": "image/gif"}
SUFFIXES = {"image": "image_*.png", "audio": "sound_*.wav", "video": "video_*.gif"}


def list_prompts() -> list[tuple[str, list[Part]]]:
    """Return fifty prompts: text alone, each medium, pairs, all three, in several orders."""
    files = {kind: sorted(SAMPLES.glob(pattern)) for kind, pattern in SUFFIXES.items()}
    prompts: list[tuple[str, list[Part]]] = [("what is three plus four ?", [])]
    for count in (1, 2, 3):
        for kinds in itertools.permutations(files, count):
            for turn in range(4):
                media = [Part(kind, files[kind][turn % len(files[kind])]) for kind in kinds]
                prompts.append((QUESTIONS[kinds[turn % count]], media))
    return prompts[:50]


def to_content(question: str, media: list[Part]) -> list[Any]:
    content: list[Any] = []
    for part in media:
        data = base64.b64encode(Path(part.value).read_bytes()).decode()
        if part.kind == "audio":
            content.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        else:
            url = f"data:{TYPES[part.kind]};base64,{data}"
            content.append({"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}})
    return [*content, {"type": "text", "text": question}]


@pytest.fixture(scope="module")
def uri(lab_store: str) -> str:
    return f"{lab_store}#mmer"


@pytest.fixture(scope="module")
def composite(uri: str) -> Composite:
    return load_composite(uri, dtype=torch.float32)


@pytest.fixture(scope="module")
def server(uri: str) -> Iterator[TestServer]:
    app, _ = make_application(ServeSettings(uri=uri, dtype="float32", max_batch=8))
    with running(app) as made:
        yield made


def test_fifty_mixed_prompts_are_answered_as_the_composite_does(
    server: TestServer, composite: Composite
) -> None:
    prompts = list_prompts()
    assert len(prompts) == 50
    expected = [
        composite.generate(composite.prompt(question, media), max_new_tokens=6)
        for question, media in prompts
    ]
    assert len(set(expected)) > 4
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)

    def ask(index: int) -> str:
        question, media = prompts[index]
        messages: Any = [{"role": "user", "content": to_content(question, media)}]
        options: Any = {"model": "mmer", "messages": messages, "max_tokens": 6}
        if index % 2:
            stream = client.chat.completions.create(stream=True, **options)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        answer = client.chat.completions.create(**options)
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    assert answers == expected
    batches = server.request("GET", "/metrics").body.decode()
    assert 'mmerge_serve_batch_prompts_bucket{le="1.0"} 50' not in batches, "none was batched"


def test_an_expert_is_rebuilt_under_its_own_name(server: TestServer, uri: str) -> None:
    expert = load_composite(uri, mode="retention", expert="image", dtype=torch.float32)
    media = [Part("image", sorted(SAMPLES.glob("image_*.png"))[0])]
    expected = expert.generate(expert.prompt(QUESTIONS["image"], media), max_new_tokens=6)
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": to_content(QUESTIONS["image"], media)}]
    answer = client.chat.completions.create(model="mmer/image", messages=messages, max_tokens=6)
    assert answer.choices[0].message.content == expected
    sound: Any = [
        {
            "role": "user",
            "content": to_content("x", [Part("audio", SAMPLES / "sound_eight_low.wav")]),
        }
    ]
    with pytest.raises(openai.BadRequestError, match="no expert for modality 'audio'"):
        client.chat.completions.create(model="mmer/image", messages=sound)


def test_generation_runs_on_past_characters_of_several_tokens(server: TestServer) -> None:
    reply = server.ask(
        {
            "model": "mmer",
            "messages": [{"role": "user", "content": "what is three plus four ?"}],
            "max_tokens": 40,
            "min_tokens": 30,
        }
    )
    assert reply.json["usage"]["completion_tokens"] >= 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_asked_to_end(uri: str, number: signal.Signals) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mmerge.pipeline.cli.main", "serve", uri, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_for(port, process=process)
        assert TestServer(port).request("GET", "/health").json["model"] == "mmer"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert b"serving mmer, mmer/image" in err
    assert b"interrupted" not in err
    assert b"Traceback" not in err


def test_an_address_that_is_taken_is_one_error(uri: str, cli: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = cli("serve", uri, "--port", str(port))
    assert code == 1
    assert f"127.0.0.1:{port} cannot be listened on" in output
    assert "Traceback" not in output


def test_an_address_for_strangers_needs_a_key_before_anything_is_loaded(cli: Any) -> None:
    code, output = cli("serve", "nowhere#x", "--host", "0.0.0.0")
    assert code == 1
    assert "no API key is set" in output
