"""Where do tests, examples and benchmarks get a real S3 server?

`start_s3_server` starts one on 127.0.0.1 in a temporary folder: RADOS Gateway where its programs are installed (it
checks signatures, keeps conditions and is fast), else moto's server, which does neither but needs nothing besides
Python.
"""

from __future__ import annotations

import atexit
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import os

Kind = Literal["rgw", "moto"]

_START_ATTEMPTS = 3


class S3ServerUnavailableError(RuntimeError):
    """The server's programs are not installed here; the message says how to get them."""


class S3Server(ABC):
    """A running S3 server that ends, with its data, at `stop`, at the end of a `with` block, or with this process.

    Attributes:
        kind: Which program serves.
        endpoint_url: `http://127.0.0.1:PORT`.
        tls_endpoint_url: The same data at `https://127.0.0.1:PORT`; None unless it was asked for and the server can do both.
        ca_file: What to trust there.
        access_key: The one user's access key.
        secret_key: The one user's secret key.
        region: Region to sign for.
    """

    kind: Kind

    def __init__(self, folder: Path, port: int, *, tls: bool = False) -> None:
        self.folder = folder
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self.access_key = "testaccesskey"
        self.secret_key = "testsecretkey0123456789"
        self.region = "us-east-1"
        self.tls_endpoint_url: str | None = None
        self.ca_file: Path | None = None
        self._port = port
        self._wants_tls = tls
        self._processes: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def start(self) -> None:
        """Start the server and return when it answers.

        Raises:
            RuntimeError: It did not start; the message ends with its log.
        """

    @abstractmethod
    def bytes_sent(self) -> int:
        """Body bytes of all objects that GET asked for so far, as the server counted them.

        Raises:
            NotImplementedError: This kind of server does not count.
        """

    @abstractmethod
    def requests(self) -> int:
        """Object GET and HEAD requests so far, but for those of missing objects, as the server counted them.

        Raises:
            NotImplementedError: This kind of server does not count.
        """

    def environment(self) -> dict[str, str]:
        """The AWS_* variables that lead any S3 client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self) -> Any:
        """A new boto3 S3 client with this server's credentials."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                s3={"addressing_style": "path", "payload_signing_enabled": False},
                request_checksum_calculation="when_required",
                max_pool_connections=32,
            ),
        )

    def upload_folder(
        self, folder: str | os.PathLike[str], bucket: str, prefix: str = "", *, num_threads: int = 4
    ) -> str:
        """Upload a folder's files, those of its subfolders too, into a bucket, made when missing; gives the `s3://` uri."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        prefix = prefix.strip("/")

        def upload(path: Path) -> None:
            with path.open("rb") as body:
                client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}".lstrip("/"), Body=body)

        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(upload, files):
                pass
        return f"s3://{bucket}/{prefix}".rstrip("/")

    def process_ids(self) -> list[int]:
        """The server's own processes."""
        return [process.pid for process in self._processes]

    def stop(self) -> None:
        """End the server's processes and delete its data; may be called twice."""
        # The gateway goes before the daemons it talks to. Killed, not asked: a store in memory has nothing to save.
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)

    def spawn(self, *command: str) -> None:
        """Start a process that ends at `stop`, or with the thread that started it, whichever comes first."""
        if shutil.which("setpriv"):
            command = ("setpriv", "--pdeathsig", "KILL", "--", *command)
        with (self.folder / "server.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def wait_until_it_answers(self, *, timeout_seconds: float = 30.0) -> None:
        """Return when the port accepts connections; raise `RuntimeError` when a process ends or time is up."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        log = (self.folder / "server.log").read_text(errors="replace")
        raise RuntimeError(f"{self.kind} does not answer at {self.endpoint_url}: {log[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class MotoServer(S3Server):
    """moto's server in its own process: about 40 MB/s, any credentials are right, nothing is counted."""

    kind: Kind = "moto"

    def start(self) -> None:
        """Start moto's command line in a process of its own."""
        command = "import sys; from moto.server import main; main(sys.argv[1:])"
        self.spawn(sys.executable, "-c", command, "-H", "127.0.0.1", "-p", str(self._port))
        self.wait_until_it_answers()

    def bytes_sent(self) -> int:
        """Not counted here."""
        raise NotImplementedError("moto does not count bytes; install radosgw for that")

    def requests(self) -> int:
        """Not counted here."""
        raise NotImplementedError("moto does not count requests; install radosgw for that")


def start_s3_server(kind: Literal["auto", "rgw", "moto"] = "auto", *, tls: bool = False) -> S3Server:
    """Start a server in about two seconds; use it in a `with` block, which stops it.

    Args:
        kind: Which program; "auto" = RADOS Gateway where it is installed.
        tls: Serve https too, on another port, where the program can; needs the package `trustme`.

    Raises:
        S3ServerUnavailableError: Its programs are not installed.
        RuntimeError: It did not start.
    """
    from ray_streamer.testing.rgw import RadosGateway, missing_programs

    missing = missing_programs()
    has_moto = find_spec("moto") is not None and find_spec("flask") is not None
    if kind == "rgw" and missing:
        raise S3ServerUnavailableError(f"{', '.join(missing)} not found; apt-get install radosgw ceph-mon ceph-osd")
    if kind != "rgw" and missing and not has_moto:
        raise S3ServerUnavailableError(
            "no S3 server here; apt-get install radosgw ceph-mon ceph-osd, or pip install 'moto[server]'"
        )
    server_class = MotoServer if kind == "moto" or missing else RadosGateway
    for _ in range(_START_ATTEMPTS - 1):
        # Somebody else may take a port between its choice and its use.
        with suppress(RuntimeError):
            return _start(server_class, tls=tls)
    return _start(server_class, tls=tls)


def _start(server_class: type[S3Server], *, tls: bool) -> S3Server:
    # Unix socket paths are short, so the folder is not put below a long test path.
    server = server_class(Path(tempfile.mkdtemp(prefix="s3-server-")), free_port(), tls=tls)
    atexit.register(server.stop)
    try:
        server.start()
    except BaseException:
        server.stop()
        raise
    return server


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment, and that no outgoing connection gets by chance.

    The kernel takes ports of outgoing connections from 32768 on, so a port from there may be gone before a server has it.
    """
    while True:
        port = 10_000 + secrets.randbelow(32_768 - 10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
