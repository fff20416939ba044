"""A real Ray cluster of two nodes on this machine, on loopback addresses of their own."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Read when Ray is imported: without it Ray listens on all addresses and both nodes get the same one.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

NODE_IPS = ("127.0.0.2", "127.0.0.3")
# No measure of anything: a busy machine takes long.
HANG_SECONDS = 120.0


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """Two nodes with 2 CPUs each, this process connected to the first; the cluster's address."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=2, node_ip_address=NODE_IPS[0], include_dashboard=False)
    cluster.add_node(num_cpus=2, node_ip_address=NODE_IPS[1], labels={"zone": "far"})
    try:
        ray.init(address=cluster.address, _node_ip_address=NODE_IPS[0], log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def idle_cluster(ray_cluster: str, wait_until: Callable[[Callable[[], bool]], None]) -> Iterator[str]:
    """The same cluster, all of it free again after the test: where Ray puts the next group depends on it."""
    import ray

    yield ray_cluster
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Poll a condition until it holds."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"not so within {HANG_SECONDS} s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def assert_gone(wait_until: Callable[[Callable[[], bool]], None]) -> Callable[[Iterable[int]], None]:
    """Every one of these processes ends."""

    def check(pids: Iterable[int]) -> None:
        alive = list(pids)
        assert alive
        wait_until(lambda: not any(_is_running(pid) for pid in alive))

    return check


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
