"""How does a test run an engine? In a process of its own, bounded, with a folder of its own for what vLLM leaves in TMPDIR."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_SECONDS = 420
HERE = Path(__file__).parent


def run_engine(scratch: Path, engine: dict[str, Any], **wish: Any) -> dict[str, Any]:
    """What an engine with these arguments says; its log is in `scratch/engine.log`.

    Raises:
        AssertionError: It ended without an answer; says the end of its log.
    """
    status, answer, log = try_engine(scratch, engine, **wish)
    assert answer is not None, f"the engine ended with {status} and no answer:\n{log[-6000:]}"
    return answer | {"log": log}


def try_engine(scratch: Path, engine: dict[str, Any], **wish: Any) -> tuple[int, dict[str, Any] | None, str]:
    """Exit status, answer or None, and log of an engine with these arguments."""
    command = [sys.executable, str(HERE / "engine_process.py"), json.dumps({"engine": engine, **wish})]
    with _environment(scratch) as environment, (scratch / "engine.log").open("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=TIMEOUT_SECONDS, check=False)
        log.seek(0)
        text = log.read()
    answers = [line.partition("ANSWER ")[2] for line in text.splitlines() if "ANSWER {" in line]
    return done.returncode, json.loads(answers[-1]) if answers else None, text


@contextmanager
def served(scratch: Path, model: Path, *arguments: str) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """`vllm serve` with these arguments, once it is healthy; gives a function that asks it for a completion.

    Raises:
        AssertionError: It ended, or did not get healthy in time; says the end of its log.
    """
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    shape = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4"]
    with _environment(scratch) as environment, (scratch / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, *shape, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait_until_healthy(server, port, scratch / "serve.log")
            yield lambda body: _post(port, {"model": str(model), **body})
        finally:
            # Workers outlive their parent for a while.
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(TIMEOUT_SECONDS)


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.5)
    raise AssertionError(f"vllm serve did not get healthy (exit status {server.poll()}):\n{log.read_text()[-6000:]}")


def _post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def _environment(scratch: Path) -> Iterator[dict[str, str]]:
    """The environment of an engine, whose sockets lie in a folder of a short name: paths of sockets have 107 characters."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="v-", ignore_cleanup_errors=True) as folder:
        yield os.environ | {
            "TMPDIR": folder,
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "VLLM_LOGGING_LEVEL": "INFO",
        }
