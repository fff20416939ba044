"""How does a test run an engine? In a process forked from this one, which has vLLM imported already, bounded, with a log of its own.

Importing vLLM takes most of an engine's start, and a fresh engine imports it in each of its four processes. These are forked from
one that has done so, as vLLM itself forks on a GPU. So is `vllm serve`: its command's own `main`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import engine_process
import psutil
from forks import import_once

from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_SECONDS = 420
END_SECONDS = 30
HERE = Path(__file__).parent

_FORK = multiprocessing.get_context("fork")


def run_engine(scratch: Path, engine: dict[str, Any], **wish: Any) -> dict[str, Any]:
    """What an engine with these arguments says; its log is in `scratch/engine.log`.

    Raises:
        AssertionError: It ended without an answer; says the end of its log.
    """
    status, answer, log = try_engine(scratch, engine, **wish)
    assert answer is not None, f"the engine ended with {status} and no answer:\n{log[-6000:]}"
    return answer | {"log": log}


def try_engine(
    scratch: Path, engine: dict[str, Any], prepare: Callable[[], None] = lambda: None, **wish: Any
) -> tuple[int, dict[str, Any] | None, str]:
    """Exit status, answer or None, and log of an engine with these arguments.

    Args:
        scratch: Folder for the log.
        engine: Arguments of `vllm.LLM`.
        prepare: Called in the engine's process before the engine starts; its workers are forked from there.
        wish: What else the process is to do, see `engine_process`.
    """
    return in_a_fork(scratch / "engine.log", functools.partial(_run_engine, prepare, {"engine": engine, **wish}))


def in_a_fork(log: Path, work: Callable[[], None]) -> tuple[int, Any, str]:
    """Exit status, answer or None, and log of a process forked from this one that does `work` and prints its answer."""
    import_once()
    with _environment(log.parent) as environment:
        process = _FORK.Process(target=_run_forked, args=(log, environment, work))
        process.start()
        try:
            process.join(TIMEOUT_SECONDS)
        finally:
            _end(process)
    text = log.read_text()
    answers = [line.partition("ANSWER ")[2] for line in text.splitlines() if "ANSWER " in line]
    return process.exitcode, json.loads(answers[-1]) if answers else None, text


def _run_engine(prepare: Callable[[], None], wish: dict[str, Any]) -> None:
    prepare()
    engine_process.main(wish)


def _run_forked(log: Path, environment: dict[str, str], work: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        _become_engine(log, environment)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # What the interpreter does at its end, less what pytest would do. It waits for children, which an engine that failed may leave.
        ending = threading.Thread(target=import_module("multiprocessing.util")._exit_function, daemon=True)
        ending.start()
        ending.join(END_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become_engine(log: Path, environment: dict[str, str]) -> None:
    """A session, an output, an environment and a way to start processes that are this process's own."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    tempfile.tempdir = None
    import_module("vllm.logger")._configure_vllm_root_logger()
    # Looks at the class of the model in a fresh interpreter, for which vLLM has to be imported once more.
    import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda function: function()
    for name, module in list(sys.modules.items()):
        # The CPU platform spawns.
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = lambda: _FORK


@contextmanager
def served(scratch: Path, model: Path | str, *arguments: str) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """`vllm serve` with these arguments, once it is healthy; gives a function that asks it for a completion.

    Raises:
        AssertionError: It ended, or did not get healthy in time; says the end of its log.
    """
    import_once()
    port = free_port()
    shape = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4"]
    command = ["vllm", "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *shape, *arguments]
    log = scratch / "serve.log"
    with _environment(scratch) as environment:
        server = _FORK.Process(target=_run_forked, args=(log, environment, functools.partial(_run_command, command)))
        server.start()
        try:
            _wait_until_healthy(server, port, log)
            yield lambda body: _post(port, {"model": str(model), **body})
        finally:
            _end(server)


def _run_command(command: list[str]) -> None:
    sys.argv = command
    import_module("vllm.entrypoints.cli.main").main()


def _end(process: Any) -> None:
    """Ends the process and all of its session, which outlive it for a while otherwise.

    Raises:
        AssertionError: It does not end.
    """
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(other.pid) == process.pid:
                os.kill(other.pid, signal.SIGKILL)
    # It is in no session of its own yet when it is ended at once.
    process.kill()
    process.join(END_SECONDS)
    assert process.exitcode is not None, f"process {process.pid} did not end within {END_SECONDS} seconds after SIGKILL"


def _wait_until_healthy(server: Any, port: int, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and server.is_alive():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            server.join(0.5)
    raise AssertionError(f"vllm serve did not get healthy (exit status {server.exitcode}):\n{log.read_text()[-6000:]}")


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
