"""An OpenStack Swift server with its S3 API (s3api), one process per service.

Its create (`If-None-Match: *`) looks first and writes later, so several writers at once can all
succeed.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server_process import end, free_port, make_bucket, s3_environment, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("account", "container", "object")

_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
# Nothing here survives a power failure anyway.
disable_fallocate = true
fallocate_reserve = 0
log_name = {kind}
log_address = {folder}/no-log-socket
log_level = WARNING
"""

_BACKEND = """
[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
replication_server = false
"""

_PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 30
conn_timeout = 5

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{no_cache}

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
auth_pipeline_check = false
allow_no_owner = true
check_bucket_owner = false

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = SK .admin

[filter:slo]
use = egg:swift#slo
"""

_SWIFT = """
[swift-hash]
swift_hash_path_suffix = tests

[storage-policy:0]
name = one
default = yes
"""


def find_swift() -> Path | None:
    """The Python of an environment that holds `swift`: of its own, as `make swift` makes it."""
    local = REPOSITORY / ".venv" / "swift" / "bin" / "python"
    named = os.environ.get("SWIFT_PYTHON")
    return Path(named) if named else local if local.exists() else None


def keeps_attributes() -> bool:
    """Whether temporary files keep user attributes, in which Swift puts an object's metadata."""
    with tempfile.NamedTemporaryFile() as probe:
        try:
            os.setxattr(probe.name, "user.probe", b"x" * 2000)
        except OSError:
            return False
    return True


@contextmanager
def swift_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run Swift with its state in a folder; yield the variables that an S3 client needs.

    Its four processes are ended by their pids.
    """
    python = find_swift()
    assert python is not None
    ports = {kind: free_port() for kind in (*KINDS, "proxy")}
    (folder / "swift.conf").write_text(_SWIFT)
    (folder / "disks" / "d1").mkdir(parents=True)
    numbers = {"folder": folder, "no_cache": free_port(), "user": pwd.getpwuid(os.getuid()).pw_name}
    for kind in KINDS:
        (folder / f"{kind}.conf").write_text(
            (_COMMON + _BACKEND).format(kind=kind, port=ports[kind], **numbers)
        )
        _make_ring(python, folder, kind, ports[kind])
    (folder / "proxy.conf").write_text(
        (_COMMON + _PROXY).format(kind="proxy", port=ports["proxy"], **numbers)
    )
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for kind in (*KINDS, "proxy"):
            with (folder / f"{kind}.out").open("wb") as log:
                command = [
                    str(python.parent / f"swift-{kind}-server"),
                    str(folder / f"{kind}.conf"),
                    "--verbose",
                ]
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                )
        for kind, process in zip((*KINDS, "proxy"), processes, strict=True):
            wait_for(ports[kind], process=process)
        environment = s3_environment(
            f"http://127.0.0.1:{ports['proxy']}", key="test:tester", secret="SK"
        )
        make_bucket(environment, "bucket")
        yield environment
    finally:
        for process in reversed(processes):
            end(process)


def _make_ring(python: Path, folder: Path, kind: str, port: int) -> None:
    builder = str(folder / f"{kind}.builder")
    steps = (["create", "2", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"])
    for step in steps:
        done = subprocess.run(
            [str(python.parent / "swift-ring-builder"), builder, *step],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode > 1:  # 1 is a warning
            raise RuntimeError(
                f"swift-ring-builder {kind} {step[0]}: {done.stdout[-500:]}{done.stderr[-500:]}"
            )
