"""A small checkpoint, local Ray clusters, rank processes, and a look at what a load leaves behind."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import TensorSpec, llama_layout

# Child processes and actors import it, too.
sys.path.append(str(Path(__file__).parent))

from api_support import oracle
from api_support.processes import RankProcesses

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def local_ray(local_ray: None) -> None:
    """See the fixture of that name; actors get the oracle, which they cannot import, by value."""
    _give_oracle_by_value()


@pytest.fixture(scope="module")
def ray_cluster(ray_cluster: str) -> str:
    """See the fixture of that name; actors get the oracle by value, too."""
    _give_oracle_by_value()
    return ray_cluster


def _give_oracle_by_value() -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(oracle)


@pytest.fixture(scope="session")
def pair() -> Iterator[RankProcesses]:
    """Two processes that can be ranks."""
    with RankProcesses(2) as processes:
        yield processes
