"""The files for Kubernetes say only what the operators understand, start every node with
authentication, and hold no secret.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
KUBERNETES = ROOT / "infra" / "kubernetes"
SCHEMAS = ROOT / "tests" / "data" / "kuberay-schemas"
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob", "RayService")
FILES = sorted(KUBERNETES.rglob("*.yaml"))
METADATA = {
    "type": "object",
    "properties": {name: {} for name in ("name", "namespace", "labels", "annotations")},
    "additionalProperties": False,
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


RESOURCES = [
    (path, document) for path in FILES for document in documents(path) if "kind" in document
]
RAY_RESOURCES = [document for _, document in RESOURCES if document["kind"] in RAY_KINDS]


def close(schema: Any) -> Any:
    """The structural schema with every object closed, so that a key that it does not know is an
    error.
    """
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return {}
    closed = {key: value for key, value in schema.items() if key not in ("format", "default")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        closed["properties"] = {name: close(value) for name, value in schema["properties"].items()}
        closed.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = close(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = close(schema["items"])
    return closed


def validate(document: dict[str, Any]) -> None:
    read_validator(document["kind"]).validate(document)


@functools.cache
def read_validator(kind: str) -> Any:
    schema = close(json.loads((SCHEMAS / f"{kind}.v1.json").read_text()))
    schema["properties"]["metadata"] = METADATA
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def walk(
    node: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    yield path, node
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        yield from walk(child, (*path, key))


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for _, node in walk(document) if isinstance(node, dict) and "containers" in node]


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(document) for container in pod["containers"]]


def test_there_is_one_resource_of_every_kind() -> None:
    kinds = [document["kind"] for _, document in RESOURCES]
    assert all(kinds.count(kind) == 1 for kind in (*RAY_KINDS, "CronJob", "ServiceAccount")), kinds


@pytest.mark.parametrize("document", RAY_RESOURCES, ids=lambda document: document["kind"])
def test_ray_resources_fit_the_operators_schema(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize("document", RAY_RESOURCES, ids=lambda document: document["kind"])
def test_a_misspelt_key_fails_wherever_it_stands(document: dict[str, Any]) -> None:
    validator = read_validator(document["kind"])
    free = ("rayStartParams", "requests", "limits", "labels", "annotations", "metadata")
    places = [
        path
        for path, node in walk(document)
        if isinstance(node, dict) and not set(path) & set(free)
    ]
    assert len(places) > 20
    for path in places:
        spoilt = copy.deepcopy(document)
        node: Any = spoilt
        for part in path:
            node = node[part]
        node["mispelt"] = 1
        assert not validator.is_valid(spoilt), path


def test_a_renamed_key_fails() -> None:
    job = next(document for document in RAY_RESOURCES if document["kind"] == "RayJob")
    spoilt = copy.deepcopy(job)
    spoilt["spec"]["activeDeadlineSecond"] = spoilt["spec"].pop("activeDeadlineSeconds")
    with pytest.raises(jsonschema.ValidationError, match="activeDeadlineSecond"):
        validate(spoilt)


@pytest.mark.parametrize("document", RAY_RESOURCES, ids=lambda document: document["kind"])
def test_every_cluster_states_its_authentication(document: dict[str, Any]) -> None:
    specs = [
        node for _, node in walk(document) if isinstance(node, dict) and "headGroupSpec" in node
    ]
    assert [spec["authOptions"] for spec in specs] == [
        {"mode": "token", "secretName": "mmerge-ray-token"}
    ]


@pytest.mark.parametrize(
    "document",
    [document for _, document in RESOURCES if pods(document)],
    ids=lambda document: document["kind"],
)
def test_no_container_runs_as_root_or_may_become_it(document: dict[str, Any]) -> None:
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_jobs_end_by_themselves_and_are_continued_once() -> None:
    for document in RAY_RESOURCES:
        if document["kind"] in ("RayJob", "RayCronJob"):
            spec = document["spec"].get("jobTemplate", document["spec"])
            assert spec["shutdownAfterJobFinishes"] is True
            assert spec["activeDeadlineSeconds"] > 0
            assert spec["ttlSecondsAfterFinished"] > 0
            assert spec["backoffLimit"] == 1
            assert "--exclusive" in spec["entrypoint"], "two ticks must not build side by side"


def test_the_cron_job_forbids_two_at_once_has_a_deadline_and_a_history() -> None:
    (cron,) = (document for _, document in RESOURCES if document["kind"] == "CronJob")
    spec = cron["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    assert spec["successfulJobsHistoryLimit"] > 0
    assert spec["failedJobsHistoryLimit"] > 0
    (container,) = containers(cron)
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_no_file_holds_a_secret() -> None:
    for path in (ROOT / "infra").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), path
    for path, document in RESOURCES:
        assert document["kind"] != "Secret", path
        for place, node in walk(document):
            if (
                place
                and isinstance(node, str)
                and re.search(r"(?i)secret_access_key|password|auth_token$", str(place[-1]))
            ):
                pytest.fail(f"{path}: {place} is written in the open")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize(
    "folder", sorted((KUBERNETES / "overlays" / "s3").iterdir()), ids=lambda folder: folder.name
)
def test_the_s3_overlay_gives_every_container_the_secret_by_reference_and_stays_valid(
    folder: Path,
) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rendered = [document for document in yaml.safe_load_all(done.stdout) if pods(document)]
    assert len(rendered) == 1
    for container in containers(rendered[0]):
        assert container["envFrom"] == [{"secretRef": {"name": "mmerge-s3"}}]
    if rendered[0]["kind"] in RAY_KINDS:
        validate(rendered[0])


def test_every_kustomization_names_files_that_are_there() -> None:
    found = [path for path in FILES if path.name == "kustomization.yaml"]
    assert len(found) >= 12
    for path in found:
        (document,) = documents(path)
        assert set(document) <= {
            "apiVersion",
            "kind",
            "resources",
            "components",
            "patches",
            "configMapGenerator",
            "generatorOptions",
        }
        for name in [*document.get("resources", []), *document.get("components", [])]:
            assert (path.parent / name).exists(), f"{path}: {name}"


def test_the_s3_component_patches_containers_that_exist() -> None:
    (component,) = documents(KUBERNETES / "components" / "s3-credentials" / "kustomization.yaml")
    by_kind = {document["kind"]: document for _, document in RESOURCES}
    assert {patch["target"]["kind"] for patch in component["patches"]} == {*RAY_KINDS, "CronJob"}
    for patch in component["patches"]:
        operations = yaml.safe_load(patch["patch"])
        assert len(operations) == len(containers(by_kind[patch["target"]["kind"]]))
        for operation in operations:
            node: Any = by_kind[patch["target"]["kind"]]
            for part in operation["path"].strip("/").split("/")[:-1]:
                node = node[int(part)] if isinstance(node, list) else node[part]
            assert "image" in node
