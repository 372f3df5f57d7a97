"""Hostile URIs, paths and surroundings: refused with one message, and no secret in it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

URIS: dict[str, tuple[str, str]] = {
    "a password": ("s3://user:hunter2@bucket/x", "no user name or password"),
    "a key with a slash": ("s3://AKIA:ab/hunter2+c@bucket/x", "no user name or password"),
    "a signature": ("az://container/x?sig=hunter2", "holds no query"),
    "a password of the web": ("https://user:hunter2@host/x", "no user name or password"),
    "a password of the hub": ("hf://user:hunter2@org/repo", "no user name or password"),
    "an unknown scheme": ("gopher://x/y", "unknown scheme"),
    "no bucket": ("s3://", "expected s3://BUCKET/PATH"),
    "parents": ("s3://bucket/../x", "expected s3://BUCKET/PATH"),
    "a port": ("s3://bucket:99999999/x", "bucket and a path only"),
    "a broken host": ("s3://[::1/x", "s3://"),
    "the hub without repository": ("hf://org", "expected hf://ORG/REPO"),
    "the hub with parents": ("hf://org/repo@../x", "expected hf://ORG/REPO"),
    "another host": ("file://host/x", "absolute path"),
    "a NUL": ("/tmp/a\0b", "control character"),
    "escape codes": ("/tmp/\x1b[2Jb", "control character"),
    "a line break": ("/tmp/a\nb", "control character"),
    "a direction mark": ("/nowhere/a\u202eb", "no such folder"),
    "half a pair": ("/nowhere/\udcff", "no such folder"),
    "half a pair in a bucket": ("s3://bucket/\udcff", "no Unicode"),
    "a long name": ("/tmp/" + "x" * 300, "File name too long"),
    "a device": ("/dev/zero", "is a file"),
    "an empty name": ("", "no composite"),
    "a superscript number": ("STORE#mmer@²", "no number"),
    "a huge number": ("STORE#mmer@" + "9" * 200, "no number"),
    "a negative number": ("STORE#mmer@-1", "no number"),
    "a name of dots": ("STORE#../../x", "no composite"),
    "a name with a line break": ("STORE#mmer\n", "no composite"),
    "a folder with a hash": ("/nowhere/a#b/store", "no such folder"),
}


@pytest.mark.parametrize("name", URIS)
@pytest.mark.parametrize("command", ["show", "verify", "generate"])
def test_a_hostile_uri_is_refused(
    command: str,
    name: str,
    lab_store: str,
    refuse: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, reason = URIS[name]
    err = refuse(command, uri.replace("STORE", lab_store), *(["hi"] * (command == "generate")))
    assert reason in " ".join(err.split()), err
    assert "hunter2" not in err
    assert len(err) < 8000


@pytest.mark.parametrize("target", ["a#b", "s3://u:hunter2@b/x", "a\x1bb", "file://h/x"])
def test_nothing_is_copied_to_a_hostile_place(
    target: str, lab_store: str, tmp_path: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hunter2" not in refuse("copy", f"{lab_store}#mmer", target)
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_an_endpoint_is_not_printed(
    refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter3")
    monkeypatch.setenv("AWS_REGION", "x")
    monkeypatch.setenv("MMERGE_RETRY_TIMEOUT", "1")
    monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "1")
    err = refuse("show", "s3://bucket/x")
    assert "hunter" not in err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("place", ["--gpus", "9" * 5000 + "x80"]),
        ("place", ["--gpus", "1x" + "9" * 400]),
        ("place", ["--gpus", "٣x80"]),
        ("gc", ["--grace", "9" * 400 + "d"]),
        ("gc", ["--grace", "-1d"]),
        ("gc", ["--grace", "1²d"]),
    ],
)
def test_a_hostile_number_is_refused(
    command: str, arguments: list[str], lab_store: str, refuse: Any
) -> None:
    fragment = "#mmer" if command == "place" else ""
    refuse(command, f"{lab_store}{fragment}", *arguments)


def run_program(*arguments: str, script: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run `mmerge` as a program of its own, from a shell that sets up its surroundings."""
    program = f"{sys.executable} -m mmerge.pipeline.cli.main"
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"} | options.pop("env", {})
    return subprocess.run(
        ["bash", "-c", script.replace("MMERGE", program), "x", *arguments],
        capture_output=True,
        timeout=120,
        env=environment,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    ("script", "code", "text"),
    [
        ('exec MMERGE show "$1" >/dev/full', 1, b"No space left on device"),
        ('exec MMERGE show "$1" >&-', 0, b""),
        ('exec MMERGE show "$1" 2>&-', 0, b"mmer"),
        ('exec MMERGE show "$1" <&- >&- 2>&-', 0, b""),
        ("exec MMERGE show /nowhere 2>/dev/full", 1, b""),
        ('exec MMERGE show "/nowhere/ü" 2>&1 >/dev/null', 1, b"no such folder"),
        ('MMERGE show "$1" | true; exit ${PIPESTATUS[0]}', None, b""),
    ],
)
def test_poor_streams_end_in_a_message_or_in_silence(
    script: str, code: int | None, text: bytes, lab_store: str
) -> None:
    done = run_program(lab_store, script=script, env={"PYTHONIOENCODING": "ascii"})
    if code is not None:
        assert done.returncode == code, done
    assert text in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    assert b"fault of mmerge" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_bomb_is_refused_by_a_process_with_little_memory(folder: Path) -> None:
    laughs = "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (folder / "r.yaml").write_text("a: &a [x, x, x]\n" + laughs + "name: *i\n")

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    done = run_program(
        str(folder / "r.yaml"), script='exec MMERGE plan "$1"', preexec_fn=limit_memory
    )
    assert done.returncode == 1
    assert b"aliases expanded" in done.stderr
    assert b"Traceback" not in done.stderr


def test_names_are_printed_as_they_are_and_drive_no_terminal(capsys: Any) -> None:
    from mmerge.pipeline.cli.output import out, print_text
    from mmerge.pipeline.monitoring.printable import escape, escape_controls
    from mmerge.pipeline.views.tables import make_table

    hostile = "a[bold red]b[/x]\x1b[31m\r\b\u202e\u200b\x85\u2028c"
    shown = "a[bold red]b[/x]\\x1b[31m\\r\\x08\\u202e\\u200b\\x85\\u2028c"
    assert escape_controls(hostile) == shown
    assert escape_controls("a\nb\tü 中 😀") == "a\nb\tü 中 😀"
    assert escape_controls("\ud800") == "\\ud800"
    table = make_table("[red]name[/red]")
    table.add_data(hostile)
    out.print(table)
    out.print(escape(hostile))
    out.print(hostile, markup=False)
    print_text(hostile)
    printed = capsys.readouterr().out
    assert printed.count("\\x1b[31m") == 4
    assert "[red]name[/red]" in printed
    assert all(character.isprintable() or character == "\n" for character in printed)


def test_log_lines_hold_no_control_characters_and_no_secrets() -> None:
    import logging

    from mmerge.pipeline.monitoring.printable import PlainFormatter
    from mmerge.pipeline.monitoring.progress import JsonFormatter

    message = "a\x1b[2J http://u:hunter2@h/x"
    record = logging.LogRecord("x", logging.INFO, "x", 1, message, None, None)
    assert PlainFormatter("%(message)s").format(record) == "a\\x1b[2J http://***@h/x"
    assert json.loads(JsonFormatter().format(record))["message"] == "a\x1b[2J http://***@h/x"
    assert "\x1b" not in JsonFormatter().format(record)
