"""Measure `mmerge serve`: requests per second by number of clients, wrong answers, and memory.

    python benchmarks/bench_serve.py                                  # the lab's composite
    python benchmarks/bench_serve.py --clients 1 8 32 --requests 1000

Every request is one of a set of mixed prompts (text, image, sound, video, and several of them). Its
answer is compared with the one that the server gave when it was asked alone. Ratios are of requests
per second within one run.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "examples" / "lab" / "samples"
PATTERNS = {"image": "image_*.png", "audio": "sound_*.wav", "video": "video_*.gif"}
TYPES = {"image": "image/png", "video": "image/gif"}
START_S = 180


@dataclass(frozen=True)
class Row:
    """What was measured with one number of clients."""

    clients: int
    requests: int
    wrong: int
    seconds: float
    requests_per_second: float
    ratio_to_first: float
    resident_mib: float


def main() -> None:
    """Start a server, ask it, and print one line per number of clients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", default=str(ROOT / "build" / "demo" / "store") + "#mmer")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    port = find_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mmerge.pipeline.cli.main", "serve", options.uri),
            *("--port", str(port), "--model-name", "bench", "--max-batch", "32"),
            *("--dtype", options.dtype),
        ]
    )
    try:
        wait_for(port, server)
        rows = measure(port, server.pid, options)
    finally:
        server.terminate()
        server.wait(60)
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def find_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            request(port, "GET", "/health")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the server did not start")


def request(port: int, method: str, path: str, body: bytes | None = None) -> Any:
    """Return the JSON of an answer; raises if its status is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {data[:500]!r}")
    return json.loads(data)


def make_bodies(max_tokens: int) -> list[bytes]:
    """Return requests of text, each medium, all pairs and all three."""
    files = {kind: sorted(SAMPLES.glob(pattern)) for kind, pattern in PATTERNS.items()}
    bodies = []
    for count in range(4):
        for kinds in itertools.combinations(files, count):
            for turn in range(4):
                media = [to_content(kind, files[kind][turn % len(files[kind])]) for kind in kinds]
                text = {"type": "text", "text": "which digit is in the image ?"}
                body = {
                    "model": "bench",
                    "messages": [{"role": "user", "content": [*media, text]}],
                    "max_tokens": max_tokens,
                    "min_tokens": max_tokens,
                }
                bodies.append(json.dumps(body).encode())
    return bodies


def to_content(kind: str, path: Path) -> dict[str, Any]:
    """Return a file as a part of a message."""
    data = base64.b64encode(path.read_bytes()).decode()
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{TYPES[kind]};base64,{data}"}}


def ask(port: int, body: bytes) -> str:
    """Return the text of an answer."""
    answer = request(port, "POST", "/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


def measure(port: int, pid: int, options: argparse.Namespace) -> list[Row]:
    """Return a row per number of clients."""
    bodies = make_bodies(options.max_tokens)
    expected = [ask(port, body) for body in bodies]
    rows: list[Row] = []
    for clients in options.clients:
        indices = [number % len(bodies) for number in range(options.requests)]
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda index: ask(port, bodies[index]), indices))
        seconds = time.monotonic() - began
        wrong = sum(
            answer != expected[index] for answer, index in zip(answers, indices, strict=True)
        )
        rate = len(indices) / seconds
        first = rows[0].requests_per_second if rows else rate
        row = Row(clients, len(indices), wrong, seconds, rate, rate / first, resident_mib(pid))
        rows.append(row)
        print(
            f"{clients:3} clients: {row.requests} requests, {wrong} wrong, {rate:.1f} per second"
            f" ({row.ratio_to_first:.2f} times one client), {row.resident_mib:,.0f} MiB"
        )
    return rows


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
