"""How does one start Ceph's RADOS Gateway, a complete S3 server, without root, systemd or a cluster?

One monitor, one object store in memory, one gateway, all on 127.0.0.1 and below one folder. Data lives in memory, about
twice its size, and is gone at the end. Buckets are also served in host names, as BUCKET.s3.localhost, for whoever makes
that name mean this machine.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import uuid
from typing import Any

from ray_streamer.testing.certificates import make_certificates
from ray_streamer.testing.s3_server import Kind, S3Server, free_port

_PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "radosgw-admin", "ceph", "monmaptool")
_STORE_BYTES = 6 << 30
_STILL_SECONDS = 0.01
_MOST_LOOKS = 100
"""Counters do not stand still where other clients go on."""

# Not obvious, and each found the hard way:
# - "ms mon client mode = crc": the gateway's default is "secure", which hangs for ever when authentication is off;
# - "tcp_nodelay=1": without it every small ranged GET waits about 40 ms for a delayed acknowledgement;
# - "osd crush initial weight": in memory the store's size rounds to weight 0, and nothing is ever placed.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
ms bind msgr2 = true
auth cluster required = none
auth service required = none
auth client required = none
ms crc data = false
ms mon client mode = crc
ms async op threads = 2
run dir = {folder}
log file = {folder}/$name.log
crash dir = {folder}
log max recent = 100
admin socket =
debug none = 0/0
debug auth = 0/0
debug ms = 0/0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
[mon]
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = {folder}/osd
osd journal = {folder}/osd/journal
osd objectstore = memstore
osd uuid = {osd_uuid}
memstore device bytes = {store_bytes}
osd crush initial weight = 1
osd class load list = *
osd class default list = *
osd max scrubs = 0
osd op num shards = 2
osd op num threads per shard = 2
debug osd = 0/0
debug memstore = 0/0
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast tcp_nodelay=1 endpoint=127.0.0.1:{port}{tls_endpoint}
rgw dns name = s3.localhost
rgw get obj window size = 16777216
rgw put obj min window size = 16777216
rgw thread pool size = 128
rgw run sync thread = false
rgw enable ops log = false
rgw enable usage log = false
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 60
admin socket = {folder}/rgw.asok
debug rgw = 0/0
debug objecter = 0/0
"""


def missing_programs() -> list[str]:
    """The programs that a gateway needs and that are not on the PATH."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


class RadosGateway(S3Server):
    """RADOS Gateway over a store in memory: checks signatures, honours conditions, serves about 1 GB/s on two cores."""

    kind: Kind = "rgw"

    def start(self) -> None:
        """Start monitor, store and gateway, in this order, and make the user."""
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        fsid, osd_uuid, mon_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        (self.folder / "ceph.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                fsid=fsid,
                osd_uuid=osd_uuid,
                mon_port=mon_port,
                port=self._port,
                tls_endpoint=self._tls_endpoint() if self._wants_tls else "",
                store_bytes=_STORE_BYTES,
            )
        )
        monmap = str(self.folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        self._run("ceph-mon", *self._conf, "-i", "a", "--mkfs", "--monmap", monmap)
        self.spawn("ceph-mon", *self._conf, "-i", "a", "-f")
        self._run("ceph", *self._conf, "--connect-timeout", "40", "osd", "new", osd_uuid)
        self._run("ceph-osd", *self._conf, "-i", "0", "--mkfs")
        self.spawn("ceph-osd", *self._conf, "-i", "0", "-f")
        self.add_user("test", self.access_key, self.secret_key)
        self.spawn("radosgw", *self._conf, "-n", "client.rgw", "-f")
        self.wait_until_it_answers()

    def add_user(self, name: str, access_key: str, secret_key: str) -> None:
        """Make a user who owns nothing yet."""
        keys = (f"--access-key={access_key}", f"--secret-key={secret_key}")
        user = (f"--uid={name}", f"--display-name={name}")
        self._run("radosgw-admin", *self._conf, "-n", "client.rgw", "user", "create", *user, *keys)

    def bytes_sent(self) -> int:
        """Body bytes of all objects that GET asked for so far."""
        counters = self._counters()
        # The gateway counts last minus first, one byte less than it sends with each answer.
        return counters["get_b"] + counters["get_initial_lat"]["avgcount"]

    def requests(self) -> int:
        """Object GET and HEAD requests so far; refused conditions and ranges count, missing objects do not."""
        return int(self._counters()["get"])

    def _tls_endpoint(self) -> str:
        """The frontend's options for https."""
        port, certificates = free_port(), make_certificates(self.folder)
        self.tls_endpoint_url = f"https://127.0.0.1:{port}"
        self.ca_file = certificates.ca_file
        return f" ssl_endpoint=127.0.0.1:{port} ssl_certificate={certificates.server_file}"

    @property
    def _conf(self) -> tuple[str, str]:
        return "-c", str(self.folder / "ceph.conf")

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{command[0]} failed with {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}"
            )

    def _counters(self) -> dict[str, Any]:
        """The gateway's counters, as soon as they stand still: a client may have its last byte before that answer is counted."""
        now = self._counters_now()
        for _ in range(_MOST_LOOKS):
            time.sleep(_STILL_SECONDS)
            before, now = now, self._counters_now()
            if now == before:
                break
        return now

    def _counters_now(self) -> dict[str, Any]:
        """The same at this moment, over its admin socket: a command and NUL go out, a length and JSON come back."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(10)
            admin.connect(str(self.folder / "rgw.asok"))
            admin.sendall(b'{"prefix": "perf dump"}\0')
            with admin.makefile("rb") as answer:
                counters = json.loads(answer.read(int.from_bytes(answer.read(4), "big")))
        # Of what clients asked for; the others change by themselves.
        return {name: count for name, count in counters["rgw"].items() if name.startswith("get")}
