"""Fixtures that every test may use: a clean environment, and a real local S3 server."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from ray_streamer.testing.s3_server import S3Server, S3ServerUnavailableError, start_s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator

# No test asserts on time, and a first example may wait for a machine that is busy.
hypothesis.settings.register_profile(
    "ray_streamer",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ray_streamer")

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


# What starts Ray stays together: such tests also look for the Rays of this machine.
RAY_TESTS = (
    "cluster/",
    "cli/",
    *(f"api/test_{name}.py" for name in (
        "bad_input", "failures", "kills", "load_sharded", "memory", "meshes", "secrets", "two_nodes",
    )),
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one file, and all that start Ray, run in one process when several share the work (`-n 3 --dist loadgroup`)."""
    if config.pluginmanager.has_plugin("xdist"):
        here = Path(__file__).parent
        for item in items:
            name = os.path.relpath(item.path, here)
            item.add_marker(pytest.mark.xdist_group("ray" if name.startswith(RAY_TESTS) else name))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting or credential of the machine reaches a test."""
    for name in os.environ:
        if name.startswith(("RAY_STREAMER_", "RUNAI_STREAMER_", "AWS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # On a busy machine any answer may be late; tests that count requests would count the second ones too.
    monkeypatch.setenv("RAY_STREAMER_HEDGE_PERCENT", "0")
    # A home directory may hold credentials too.
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A run that was started in the background of a shell ignores SIGINT; what is tested here does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole session; tests share it, so each uses a bucket or prefix of its own."""
    try:
        server = start_s3_server(tls=True)
    except S3ServerUnavailableError as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def s3_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same server, with its endpoint and credentials in the environment of this process and its children."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server
