"""A Ceph object gateway with one monitor and one disk, for the store contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from server_process import end, free_port, make_bucket, s3_environment, wait_for


def has_ceph() -> bool:
    return all(
        shutil.which(name)
        for name in (
            "ceph-mon",
            "ceph-osd",
            "radosgw",
            "ceph-authtool",
            "monmaptool",
            "radosgw-admin",
        )
    )


_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
mon data avail warn = 2
mon data avail crit = 1
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = {kind}
bluestore block size = 17179869184
bluestore block create = true
memstore device bytes = 4294967296
osd memory target = 939524096
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable apis = s3, admin
rgw dns name = localhost
"""


@contextmanager
def ceph_server(
    folder: Path, *, kind: Literal["memstore", "bluestore"] = "memstore"
) -> Iterator[dict[str, str]]:
    """Run an S3 gateway of Ceph and yield the client's environment variables.

    Its create is atomic, and it checks signatures.
    """
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    port, fsid = free_port(), str(uuid.uuid4())
    conf = folder / "ceph.conf"
    conf.write_text(
        _CEPH_CONF.format(
            fsid=fsid, folder=folder, port=port, mon1=free_port(), mon2=free_port(), kind=kind
        )
    )
    environment = os.environ | {"CEPH_CONF": str(conf)}
    processes: list[subprocess.Popen[bytes]] = []

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
        return done.stdout

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [*command, "-f"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    try:
        keyring = str(folder / "keyring")
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        for index, name in enumerate(("client.admin", "mon.", "osd.0", "client.rgw.a")):
            call(
                "ceph-authtool",
                keyring,
                *(["--create-keyring"] if index == 0 else []),
                "--gen-key",
                "-n",
                name,
                *caps,
            )
        monmap = conf.read_text().split("mon host = ")[1].splitlines()[0]
        call(
            "monmaptool", "--create", "--fsid", fsid, "--addv", "a", monmap, str(folder / "monmap")
        )
        call(
            "ceph-mon",
            "--mkfs",
            "-i",
            "a",
            "--monmap",
            str(folder / "monmap"),
            "--keyring",
            keyring,
        )
        start("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        call("ceph", "osd", "new", disk)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0")
        deadline = time.monotonic() + 60
        while "1 up" not in call("ceph", "osd", "stat") and time.monotonic() < deadline:
            time.sleep(0.3)
        start("radosgw", "-n", "client.rgw.a")
        wait_for(port, process=processes[-1])
        call(
            "radosgw-admin",
            "user",
            "create",
            "--uid=t",
            "--display-name=t",
            "--access-key=AK",
            "--secret-key=SK",
        )
        client_environment = s3_environment(f"http://127.0.0.1:{port}")
        make_bucket(client_environment, "bucket")
        yield client_environment
    finally:
        for process in reversed(processes):
            end(process)
