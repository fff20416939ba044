"""A small checkpoint, local Ray clusters, rank processes, and a look at what a load leaves behind."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import TensorSpec, llama_layout

# Child processes and actors import it, too.
sys.path.append(str(Path(__file__).parent))

from api_support import oracle
from api_support.processes import RankProcesses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Read when Ray is imported: without it Ray listens on all addresses and both nodes get the same one.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

NODE_IPS = ("127.0.0.2", "127.0.0.3")
# No measure of anything: a busy machine takes long.
HANG_SECONDS = 120.0

LAYOUT = llama_layout(hidden=256, layers=2, heads=8, kv_heads=2, intermediate=512, vocab=1001)
TENSORS = [
    *LAYOUT.tensors,
    TensorSpec("model.scale", "F32", ()),
    TensorSpec("model.positions", "I64", (77,)),
    TensorSpec("model.nothing", "BF16", (0,)),
]


@dataclass(frozen=True)
class Checkpoint:
    """A Llama of 3 MB in three files with an index json; its vocabulary does not divide evenly.

    Attributes:
        folder: Where it lies.
        num_bytes: Of all tensors.
        names: Of all tensors.
    """

    folder: Path
    num_bytes: int
    names: frozenset[str]

    @property
    def uri(self) -> str:
        """The folder as the API takes it."""
        return str(self.folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint that most tests load; nobody changes it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), TENSORS, num_files=3, config=LAYOUT.config)
    names = frozenset(spec.name for spec in TENSORS)
    return Checkpoint(folder, sum(spec.num_bytes for spec in TENSORS), names)


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same tensors, other bytes, in one file."""
    folder = write_checkpoint(tmp_path_factory.mktemp("single"), TENSORS, seed=1, config=LAYOUT.config)
    names = frozenset(spec.name for spec in TENSORS)
    return Checkpoint(folder, sum(spec.num_bytes for spec in TENSORS), names)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this module alone, as `load_sharded` itself would start it, with room for four ranks."""
    import ray

    from ray_streamer.cluster.connection import connect

    ray.cloudpickle.register_pickle_by_value(oracle)
    session = connect("local", num_local_cpus=4)
    yield
    session.close()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """A Ray cluster of two nodes with 2 CPUs each, this process connected to the first."""
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(oracle)
    cluster = Cluster()
    cluster.add_node(num_cpus=2, node_ip_address=NODE_IPS[0], include_dashboard=False)
    cluster.add_node(num_cpus=2, node_ip_address=NODE_IPS[1])
    try:
        ray.init(address=cluster.address, _node_ip_address=NODE_IPS[0], log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="session")
def pair() -> Iterator[RankProcesses]:
    """Two processes that can be ranks."""
    with RankProcesses(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], Any]], None]:
    """Poll a condition until it holds."""

    def wait(holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"not so within {HANG_SECONDS} s"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def assert_gone(wait_until: Callable[..., None]) -> Callable[[Iterable[int]], None]:
    """Every one of these processes ends."""

    def check(pids: Iterable[int]) -> None:
        alive = list(pids)
        assert alive
        wait_until(lambda: not any(is_running(pid) for pid in alive))

    return check


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
