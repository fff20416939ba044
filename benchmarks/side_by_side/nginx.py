"""How is a folder served by a real web server, and how many bytes does it send? By nginx on 127.0.0.1, which writes them down."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from ray_streamer.testing.certificates import make_certificates
from ray_streamer.testing.s3_server import free_port

_CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{ worker_connections 1024; }}
http {{
  log_format sent $body_bytes_sent; access_log {folder}/sent.log sent;
  sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl; ssl_certificate {pem}; ssl_certificate_key {pem}; root {root};
  }}
}}
"""

START_SECONDS = 30.0


class Nginx:
    """One process that serves the files below `root`, plain and over TLS, for the length of a `with` block.

    Attributes:
        url: Plain.
        tls_url: The same files over TLS.
        ca_file: What to trust there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        certificates = make_certificates(self._folder)
        self.ca_file = certificates.ca_file
        self._ports = (free_port(), free_port())
        self.url, self.tls_url = (
            f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(("http", "https"), self._ports, strict=True)
        )
        (self._folder / "nginx.conf").write_text(
            _CONFIGURATION.format(
                folder=self._folder,
                root=root.absolute(),
                port=self._ports[0],
                tls_port=self._ports[1],
                pem=certificates.server_file,
            )
        )

    @staticmethod
    def is_installed() -> bool:
        """Whether there is an nginx to start."""
        return _program() is not None

    def bytes_sent(self) -> int:
        """Body bytes of all answers so far."""
        log = self._folder / "sent.log"
        return sum(map(int, log.read_text().split())) if log.exists() else 0

    def __enter__(self) -> Self:
        """Starts it; returns when it answers.

        Raises:
            RuntimeError: It did not start; the message ends with its log.
        """
        command = [str(_program()), "-c", str(self._folder / "nginx.conf"), "-p", str(self._folder)]
        if shutil.which("setpriv"):
            # It ends with whoever started it.
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._ports[1]), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        log = self._folder / "error.log"
        said = log.read_text(errors="replace")[-1000:] if log.exists() else "it wrote no log"
        raise RuntimeError(f"nginx does not answer at {self.tls_url}: {said}")


def _program() -> str | None:
    # Debian puts it where only root looks.
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
