"""Finding a Ray: the connected one, a named one, none at all."""

from __future__ import annotations

import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray

from ray_streamer.cluster.session import connect
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def dead_address() -> str:
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name leaves room for the names of Ray's Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_an_address_that_does_not_answer_is_refused_at_once(dead_address: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at address='{dead_address}'.*host:port"):
        connect(dead_address)
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_environments_address_is_named_when_it_does_not_answer(
    address: str | None, dead_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS='{dead_address}'"):
        connect(address)


@pytest.mark.parametrize("address", ["nonsense", "host:port", "ray://127.0.0.1:10001"])
def test_an_address_that_cannot_be_used_is_a_cluster_error(address: str) -> None:
    with pytest.raises(ClusterError, match=r"address=|Ray Client"):
        connect(address)


def test_ray_client_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ClusterError, match="ray job submit"):
        connect()


def test_a_local_ray_is_started_when_the_remembered_cluster_is_gone(
    dead_address: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    (short_folder / "ray").mkdir()
    (short_folder / "ray" / "ray_current_cluster").write_text(dead_address)
    session = connect(num_local_cpus=5)
    try:
        assert session.is_opened_here
        assert ray.cluster_resources()["CPU"] == 5
        second = connect("auto")
        assert (second.address, second.is_opened_here) == (session.address, False)
        second.close()
        assert ray.is_initialized()
    finally:
        session.close()
    assert not ray.is_initialized()
    session.close()


def test_a_cluster_is_joined_by_its_address(ray_cluster: str) -> None:
    ray.shutdown()
    session = connect(ray_cluster)
    assert (session.address, session.is_opened_here) == (ray_cluster, True)
    assert len(ray.nodes()) == 2
    session.close()
    assert not ray.is_initialized()
