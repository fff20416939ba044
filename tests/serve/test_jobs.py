"""`ray-streamer submit` on a real Ray that asks for a token: a job that loads, one that fails, and who is not let in."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import llama_layout
from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300
TOKEN = "0123456789abcdef0123456789abcdef"
# Ray's own range of them may hold what free_port gives.
OWN_PORTS = ("--min-worker-port=0", "--max-worker-port=0")
# As the command that is installed; this one runs from any environment.
SCRIPT = f"#!{sys.executable}\nfrom ray_streamer.cli import main\nmain()\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="Ray's dashboard is not installed here"
    ),
]


class Cluster(NamedTuple):
    """A Ray with a dashboard.

    Attributes:
        dashboard: Its http:// address.
        address: The cluster's own.
        environment: Of a user whom it lets in.
    """

    dashboard: str
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    (folder / "ray-streamer").write_text(SCRIPT)
    (folder / "ray-streamer").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_raylet_start_wait_time_s": "150",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path]),
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
    }
    ports = {name: free_port() for name in ("--port", "--dashboard-port", "--dashboard-agent-listen-port")}
    flags = ["--num-cpus=3", "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block", *OWN_PORTS]
    flags += [f"{name}={port}" for name, port in ports.items()]
    log = folder / "log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    try:
        assert head.stdout is not None
        assert any("runtime started" in line for line in head.stdout), log.read_text()
        yield Cluster(f"http://127.0.0.1:{ports['--dashboard-port']}", f"127.0.0.1:{ports['--port']}", environment)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)
        if head.stdout is not None:
            head.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = llama_layout(64, 2, 4, 2, 128, 256)
    return write_checkpoint(tmp_path_factory.mktemp("llama"), layout.tensors, num_files=2, config=layout.config)


def submit(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ray_streamer.cli import main; main()", "submit", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


def test_a_job_ends_with_its_report(cluster: Cluster, checkpoint: Path) -> None:
    # By both addresses of the cluster: that of the dashboard, and its own.
    for address in (cluster.dashboard, cluster.address):
        arguments = [checkpoint, "--tp", 2, "--address", address, "--wait", "--env", "RAY_STREAMER_CONCURRENCY=3"]
        ended = submit(cluster.environment, *arguments)
        assert ended.returncode == 0, ended.stderr
        report = json.loads(ended.stdout)
        assert (report["uri"], report["mesh"]["tp"]) == (str(checkpoint), 2)
        assert report["bytes_read"] + report["page_cache_bytes"] >= report["checkpoint_bytes"]
        assert "raysubmit_" in ended.stderr


def test_a_job_that_fails_names_the_rank_and_is_not_zero(cluster: Cluster, checkpoint: Path) -> None:
    # Only a rank finds out that it has no such device.
    arguments = [
        checkpoint,
        "--tp",
        2,
        "--address",
        cluster.dashboard,
        "--wait",
        "--device",
        "cuda:7",
        "--num-gpus-per-rank",
        0,
    ]
    ended = submit(cluster.environment, *arguments)
    assert ended.returncode == 1, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["type"] == "RankFailedError"
    assert "on node" in error["message"]
    assert f"exit code 1: RankFailedError: {error['message']}" in ended.stderr


def test_a_job_goes_on_without_being_waited_for(cluster: Cluster, checkpoint: Path) -> None:
    ended = submit(cluster.environment, checkpoint, "--tp", 1, "--address", cluster.dashboard, "--json")
    said = json.loads(ended.stdout)
    assert said["address"] == cluster.dashboard
    assert said["job"].startswith("raysubmit_")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"RAY_AUTH_MODE": "disabled"}, id="no-token"),
        pytest.param({"RAY_AUTH_TOKEN": "f" * 32}, id="wrong-token"),
    ],
)
def test_without_the_token_nobody_is_let_in(cluster: Cluster, checkpoint: Path, changes: dict[str, str]) -> None:
    for address in (cluster.dashboard, cluster.address):
        ended = submit(cluster.environment | changes, checkpoint, "--tp", 1, "--address", address, "--wait")
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "lets nobody in without its token" in ended.stderr
        assert "RAY_AUTH_MODE=token" in ended.stderr
