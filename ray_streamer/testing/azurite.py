"""A real server of Azure's blobs: Azurite, Microsoft's emulator, from npm (`npm install --no-save azurite`)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite, as Microsoft documents it."""

_START_SECONDS = 60.0


def azurite_program() -> str | None:
    """Where it is installed: `AZURITE`, the project's `node_modules`, or the path of programs."""
    of_project = Path(__file__).parents[2] / "node_modules" / ".bin" / "azurite-blob"
    named = os.environ.get("AZURITE") or (str(of_project) if of_project.exists() else None)
    return named or shutil.which("azurite-blob")


@contextmanager
def azurite(program: str, tls_file: Path | None = None) -> Iterator[str]:
    """Address of its blobs, without the account, for the length of a `with` block.

    Args:
        program: See `azurite_program`.
        tls_file: Certificate and key of a server that speaks TLS.

    Raises:
        RuntimeError: It did not start.
    """
    port = free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    tls = [] if tls_file is None else ["--cert", str(tls_file), "--key", str(tls_file)]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([*command, *options, *tls], stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait_until_it_answers(server, port)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"Azurite does not answer at port {port}")
