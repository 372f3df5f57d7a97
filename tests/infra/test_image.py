"""The Dockerfile and the `ray up` file: what can be checked without Docker and without machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "infra" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its arguments, continuation lines joined."""
    text = re.sub(
        r"\\\n\s*",
        " ",
        "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")),
    )
    return [
        (word, rest)
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def run_step(pattern: str, folder: Path) -> str:
    """Run the one RUN step that fits the pattern in a folder, with this interpreter as `python` and
    `pip`.
    """
    (command,) = (
        rest for word, rest in instructions() if word == "RUN" and re.search(pattern, rest)
    )
    done = subprocess.run(
        [
            "bash",
            "-euc",
            f'python() {{ "{sys.executable}" "$@"; }}; pip() {{ python -m pip "$@"; }}; {command}',
        ],
        cwd=folder,
        env=os.environ | {"ACCELERATOR": "cpu", "TORCH_INDEX_URL": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_image_runs_without_root_and_takes_no_secret() -> None:
    found = instructions()
    assert [rest for word, rest in found if word == "USER"] == ["1000:1000"]
    assert found[-1][0] == "CMD"
    assert not [rest for word, rest in found if word == "ADD"]
    assert not [
        rest
        for word, rest in found
        if word in ("ARG", "ENV") and re.search(r"(?i)password|secret|token", rest)
    ]


def test_everything_that_is_copied_is_there_and_reaches_the_build() -> None:
    copied = [
        rest.split()
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
    ]
    sources = {source for words in copied for source in words[:-1]}
    allowed = {
        line[1:]
        for line in (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_what_changes_often_lies_above_what_changes_seldom() -> None:
    order = [rest for word, rest in instructions() if word in ("RUN", "COPY")]
    places = [
        next(index for index, rest in enumerate(order) if part in rest)
        for part in (
            "constraints.txt ./",
            "^torch==",
            "requirements.txt",
            "pipeline pipeline",
            "--no-deps .",
        )
    ]
    assert places == sorted(places)


def test_the_requirements_step_lists_all_dependencies(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    if sys.version_info < (3, 11):
        pytest.skip("the step runs in the image's Python, which has tomllib")
    run_step(r"tomllib", tmp_path)
    listed = (tmp_path / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[<>=\[]", line)[0] for line in listed}
    assert {"torch", "ray", "obstore", "pydantic"} <= names
    assert {"ray[default]>=2.52", "ray[serve]>=2.52"} <= set(listed)


def test_the_torch_step_refuses_a_build_for_another_accelerator(tmp_path: Path) -> None:
    (command,) = (
        rest for word, rest in instructions() if word == "RUN" and "torch.version" in rest
    )
    for accelerator in ("cpu", "cuda"):
        code = re.search(r'python -c "(.*)"', command.replace("${ACCELERATOR}", accelerator))
        assert code is not None
        done = subprocess.run(
            [sys.executable, "-c", code[1]],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        import torch

        assert (done.returncode == 0) == (
            accelerator == ("cuda" if torch.version.cuda else "cpu")
        ), done.stderr


def test_the_package_builds_from_what_the_image_copies(tmp_path: Path) -> None:
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            subprocess.run(
                ["cp", "-r", *(str(ROOT / source) for source in sources), str(tmp_path)], check=True
            )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        "out",
        ".",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("needs setuptools 77 beside the tests")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "mmerge/pipeline/cli/main.py",
        "mmerge/workers/tasks/ray_remote.py",
        "mmerge/manifests/stores/object_store.py",
    } <= set(names)


def test_the_ray_up_file_fits_rays_own_schema_and_starts_every_node_with_authentication() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "infra" / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 2}, schema)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
