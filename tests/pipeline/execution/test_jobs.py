"""Builds as jobs: the package goes along, the log and the exit code come back, two ticks never
build side by side.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.pipeline import read_recipe
from mmerge.pipeline.execution.jobs import Jobs, make_wheel, to_absolute, to_exit_code

NUM_NODES = 1  # every job starts workers of its own, and each of those takes seconds to start


def mmerge(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmerge.pipeline.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def test_the_wheel_holds_the_code_that_runs_names_no_dependency_and_is_named_after_its_contents(
    tmp_path: Path,
) -> None:
    wheel = make_wheel(tmp_path)
    assert re.fullmatch(r"mmerge-[\d.]+-0_[0-9a-f]{12}-py3-none-any\.whl", wheel.name)
    first = wheel.read_bytes()
    assert make_wheel(tmp_path).read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert (
            archive.read("mmerge/pipeline/execution/jobs.py")
            == Path(sys.modules["mmerge.pipeline.execution.jobs"].__file__ or "").read_bytes()
        )
        assert {
            "mmerge/manifests/stores/object_store.py",
            "mmerge/workers/methods/mmer.py",
            "mmerge/pipeline/py.typed",
        } <= set(names)
        assert not [name for name in names if "__pycache__" in name]
        assert b"Requires-Dist" not in archive.read(
            next(name for name in names if name.endswith("METADATA"))
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        str(wheel),
        f"--target={tmp_path / 'site'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "mmerge" / "pipeline" / "cli" / "main.py").is_file()


def test_a_recipe_that_travels_has_its_name_and_absolute_paths(lab: Any) -> None:
    raw = lab.make_all()
    del raw["name"]
    path = lab.write_recipe(raw, "omni.yaml")
    recipe = read_recipe(path)
    moved = lab.folder / "elsewhere"
    moved.mkdir()
    (moved / "recipe.yaml").write_text(to_absolute(path, recipe))
    assert read_recipe(moved / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="cannot be seen from a cluster"):
        to_absolute(path, read_recipe(lab.write_recipe(raw | {"output": "memory://x"})))


def test_a_cluster_that_does_not_answer_is_named(lab: Any) -> None:
    done = mmerge(
        "submit", str(lab.write_recipe(lab.make_all())), "--address", "http://127.0.0.1:9"
    )
    assert done.returncode == 1
    assert "http://127.0.0.1:9: no dashboard answers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_submitted_build_streams_its_log_and_ends_with_the_drivers_exit_code(
    lab: Any, ray_nodes: Any
) -> None:
    raw = lab.make_all()
    recipe = str(lab.write_recipe(raw))
    done = mmerge("submit", recipe, "--address", ray_nodes.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merge layers.1:" in done.stdout
    assert "built" in done.stdout
    assert mmerge("verify", str(lab.folder / "store")).returncode == 0

    again = mmerge("submit", recipe, "--address", ray_nodes.dashboard)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "already refers to it" in again.stdout
    assert len(list((lab.folder / "store" / "refs" / "tiny").iterdir())) == 1

    lab.make_expert(
        "audio",
        1,
        change=lambda tensors: tensors["language_model.model.norm.weight"].fill_(float("nan")),
    )
    broken = mmerge("submit", recipe, "--address", ray_nodes.dashboard)
    assert broken.returncode == 1
    assert "model.norm.weight: NaN" in broken.stdout

    listed = json.loads(mmerge("jobs", "--address", ray_nodes.dashboard, "--json").stdout)
    mine = [job for job in listed if job["store"] == str(lab.folder / "store")]
    assert [job["status"] for job in mine] == ["SUCCEEDED", "SUCCEEDED", "FAILED"]
    assert [job["id"].rpartition("-")[2] for job in mine] == ["1", "2", "3"]
    told = mmerge("status", mine[-1]["id"], "--address", ray_nodes.dashboard)
    assert told.returncode == 1
    assert "model.norm.weight: NaN" in told.stdout
    assert (
        json.loads(
            mmerge("status", mine[0]["id"], "--address", ray_nodes.dashboard, "--json").stdout
        )[0]["state"]
        == "finished"
    )


@pytest.mark.ray
def test_two_submits_of_one_recipe_are_one_job_and_a_stopped_job_leaves_no_orphan(
    lab: Any, ray_nodes: Any
) -> None:
    lab.config |= {"num_hidden_layers": 6}
    recipe = lab.write_recipe(lab.make_all())
    jobs = Jobs(ray_nodes.dashboard)
    first, is_new = jobs.submit(recipe, options=["--block-entries", "65536"])
    assert is_new
    second, is_new = jobs.submit(recipe, options=[])
    assert (second.id, is_new) == (first.id, False)
    with pytest.raises(MmergeError, match="builds this recipe already"):
        jobs.submit(recipe, options=[], if_running="fail")
    skipped = mmerge(
        "submit", str(recipe), "--address", ray_nodes.dashboard, "--if-running", "skip"
    )
    assert skipped.returncode == 0
    assert "already builds this recipe" in skipped.stderr
    folder = lab.folder / "store" / "runs" / "tiny"
    end = time.monotonic() + 60
    while not folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    jobs._client.stop_job(first.id)
    ended = jobs.follow(first.id, lambda text: None)
    assert ended.status in ("STOPPED", "SUCCEEDED")
    assert to_exit_code(ended) == (143 if ended.status == "STOPPED" else 0)
    third, is_new = jobs.submit(recipe, options=[])
    assert is_new
    assert third.id == first.id[:-1] + "2"
    assert jobs.follow(third.id, lambda text: None).status == "SUCCEEDED"
    told = mmerge("status", str(lab.folder / "store"))
    assert told.returncode == 0
    assert "finished" in told.stdout


@pytest.mark.ray
def test_prometheus_finds_the_metrics_that_the_dashboard_and_the_alerts_ask_for(
    lab: Any, ray_nodes: Any, repository: Path
) -> None:
    from mmerge.pipeline.monitoring.metrics import COUNTERS, GAUGES, HISTOGRAMS

    assert (
        mmerge(
            "submit", str(lab.write_recipe(lab.make_all())), "--address", ray_nodes.dashboard
        ).returncode
        == 0
    )
    ports = {node["MetricsExportPort"] for node in _nodes(ray_nodes)}
    end = time.monotonic() + 40
    text = ""
    expected = {
        f"ray_{name}"
        for name in (
            "mmerge_bytes_read_total",
            "mmerge_bytes_written_total",
            "mmerge_shards_done_total",
            "mmerge_shards_total",
        )
    }
    while not all(name + "{" in text for name in expected) and time.monotonic() < end:
        time.sleep(1)
        text = "".join(_scrape(port) for port in ports)
    assert all(name + "{" in text for name in expected), sorted(
        {line.split("{")[0] for line in text.splitlines() if "mmerge" in line}
    )
    assert 'phase="merge"' in text
    known = {f"ray_{name}" for name in (*COUNTERS, *GAUGES, *HISTOGRAMS)}
    files = [
        repository / "infra" / "monitoring" / name
        for name in ("grafana-dashboard.json", "prometheus-rules.yaml")
    ]
    for path in files:
        used = {word for word in _words(path.read_text()) if word.startswith("ray_mmerge_")}
        assert used
        for word in used:
            assert any(
                word in (name, f"{name}_total", f"{name}_bucket", f"{name}_sum", f"{name}_count")
                for name in known
            ), f"{path}: {word}"
    assert json.loads(files[0].read_text())["panels"]
    assert yaml.safe_load(files[1].read_text())["kind"] == "PrometheusRule"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _nodes(ray_nodes: Any) -> list[dict[str, Any]]:
    code = (
        f"import ray, json; ray.init(address={ray_nodes.address!r}, logging_level='ERROR');"
        " print(json.dumps(ray.nodes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return [node for node in found if node["Alive"]]


def _scrape(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
