"""A model hub in one process: list, download and commit for huggingface_hub.

Files are in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer:
    """Repositories by name; every commit keeps its files. `requests` counts what was asked.

    As on the real hub, weights are sent as large files (Git LFS): asked for in a batch, put by
    their digest, named in the commit.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        """Large files by SHA-256."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = do_POST = do_PUT = lambda self: hub.handle(self)  # noqa: N815

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Add files to a branch; return the commit."""
        branches, commits = self.branches.setdefault(repo, {}), self.commits.setdefault(repo, {})
        before = commits.get(branches.get(branch, ""), {})
        after = before | files
        name = hashlib.sha1(
            repr(
                [
                    repo,
                    len(commits),
                    sorted((key, hashlib.sha1(data).hexdigest()) for key, data in after.items()),
                ]
            ).encode()
        ).hexdigest()
        commits[name], branches[branch] = after, name
        return name

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(request.path).path)
        asked = request.headers.get("Range")
        self.requests.append(f"{request.command} {path}" + (f" {asked}" if asked else ""))
        if path == "/api/repos/create":
            request_body = json.loads(body)
            repo = (
                f"{request_body['organization']}/{request_body['name']}"
                if request_body.get("organization")
                else request_body["name"]
            )
            if repo in self.branches:
                return self._json(
                    request, {"url": f"{self.endpoint}/{repo}", "error": "exists"}, status=409
                )
            self.commit(repo, {})
            return self._json(request, {"url": f"{self.endpoint}/{repo}"})
        if path.startswith("/lfs/"):
            return self._large_file(request, path.rpartition("/")[2], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(request, json.loads(body)["objects"])
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(revision|tree|preupload|commit)/([^/]+)", path
        ):
            return self._api(request, *match.groups(), body=body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(request, *match.groups())
        return self._json(request, {"error": "unknown"}, status=404)

    def _find(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> str | None:
        if repo not in self.branches:
            self._json(
                request,
                {"error": "Repository not found"},
                status=404,
                headers={"X-Error-Code": "RepoNotFound"},
            )
            return None
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            self._json(
                request,
                {"error": "Revision not found"},
                status=404,
                headers={"X-Error-Code": "RevisionNotFound"},
            )
            return None
        return commit

    def _api(
        self, request: BaseHTTPRequestHandler, repo: str, verb: str, revision: str, *, body: bytes
    ) -> None:
        commit = self._find(request, repo, revision)
        if commit is None:
            return
        files = self.commits[repo][commit]
        if verb == "revision":
            self._json(
                request,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                },
            )
        elif verb == "tree":
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            self._json(request, entries)
        elif verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                "lfs" if name.endswith((".safetensors", ".parquet")) else "regular"
                for name in names
            ]
            modes_by_name = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            self._json(request, {"files": modes_by_name})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, commit):
                self._json(request, {"error": "The branch has moved"}, status=412)
                return
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            added |= {
                line["value"]["path"]: self.large[line["value"]["oid"]]
                for line in lines
                if line["key"] == "lfsFile"
            }
            new = self.commit(repo, added, branch=revision)
            self._json(
                request,
                {
                    "commitUrl": f"{self.endpoint}/{repo}/commit/{new}",
                    "commitOid": new,
                    "success": True,
                },
            )

    def _batch(self, request: BaseHTTPRequestHandler, uploads: list[dict[str, Any]]) -> None:
        """Say where each large file is to be put; nothing of what is there already."""
        objects = [
            {"oid": upload["oid"], "size": upload["size"]}
            | (
                {}
                if upload["oid"] in self.large
                else {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{upload['oid']}"}}}
            )
            for upload in uploads
        ]
        self._json(request, {"transfer": "basic", "objects": objects})

    def _large_file(self, request: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != name:
            return self._json(request, {"error": "digest"}, status=400)
        self.large[name] = body
        return self._json(request, {})

    def _file(self, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
        commit = self._find(request, repo, revision)
        if commit is None:
            return
        data = self.commits[repo][commit].get(name)
        if data is None:
            self._json(
                request,
                {"error": "Entry not found"},
                status=404,
                headers={"X-Error-Code": "EntryNotFound"},
            )
            return
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, part = 200, data
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            start, stop = (
                int(match[1]),
                min(int(match[2]) + 1 if match[2] else len(data), len(data)),
            )
            status, part = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(request, status, headers | {"Content-Type": "application/octet-stream"}, part)

    def _json(
        self,
        request: BaseHTTPRequestHandler,
        value: Any,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._send(
            request,
            status,
            {"Content-Type": "application/json"} | (headers or {}),
            json.dumps(value).encode(),
        )

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
