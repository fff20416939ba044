"""Does a simulated load take what a real one takes? Small ones, made and replayed from their plans by the same code."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fault_process import FaultProcess

from cold_starts.node_models import side_by_side
from cold_starts.small_cases import CHECKPOINT_MIB, SMALL
from cold_starts.small_loads import Processes
from ray_streamer.doctor.memory_speed import measure_memory
from ray_streamer.machine import count_cpus
from ray_streamer.planning.limits import useful_slots
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.conditions import max_copiers
from ray_streamer.report.verdict.model import ClusterModel, NodeGroup
from ray_streamer.report.verdict.planned import Pace, model_of_plan
from ray_streamer.report.verdict.replay import replay_cluster
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cold_starts.small_cases import Small
    from ray_streamer.doctor.memory_speed import MemorySpeed
    from ray_streamer.report.verdict.model import NodeModel


SPREAD = 0.2
"""Of a first byte, earlier or later. Streams of one length that begin at one moment would end at one moment, which no real ones do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A small load, simulated and made.

    Attributes:
        name: Of the case.
        predicted_seconds: From its plan.
        measured_seconds: Of each round.
    """

    name: str
    predicted_seconds: float
    measured_seconds: tuple[float, ...]

    @property
    def error(self) -> float:
        """Of the prediction, over the median of what was measured."""
        return self.predicted_seconds / median(self.measured_seconds) - 1


def predict(small: Small, uri: str, memory: MemorySpeed) -> float:
    """Seconds of a small load from its plan: the nodes' own, and nothing that was measured of it.

    Args:
        small: The load.
        uri: Of its checkpoint, not behind the proxy.
        memory: What memory does here.
    """
    limits = (small.num_slots * small.block_bytes,) * small.num_ranks
    plan = small.request(uri).plan(Topology.even(small.num_ranks), memory_limits=limits)
    share = max(1.0, small.num_nodes * small.num_apart * small.num_ranks / count_cpus())
    pace = Pace(
        first_byte_seconds=small.first_byte_seconds,
        first_byte_spread_seconds=SPREAD * small.first_byte_seconds,
        stream_rate=small.stream_rate or math.inf,
        node_rate=math.inf,
        copy_rate=memory.copy_bytes_per_second / share,
        touch_rate=memory.touch_bytes_per_second / share,
        exchange_seconds=memory.exchange_seconds,
        num_readers=small.concurrency,
        num_slots=useful_slots(
            memory_limit=small.num_slots * small.block_bytes,
            block_bytes=small.block_bytes,
            concurrency=small.concurrency,
        ),
        num_copiers=max_copiers(small.num_ranks),
    )
    one = model_of_plan(plan.node_plans[0], range(small.num_ranks), pace)
    node = _with_late(side_by_side([one] * small.num_apart), small)
    groups = tuple(
        NodeGroup(replace(node, node_rate=float(small.node_rate(number) or math.inf)))
        for number in range(small.num_nodes)
    )
    return max(replay_cluster(ClusterModel(groups=groups, storage_rate=small.storage_rate or math.inf)))


def _with_late(node: NodeModel, small: Small) -> NodeModel:
    if small.late is None:
        return node
    every, more_seconds = small.late
    ranks = (
        replace(
            rank,
            reads=tuple(
                read._replace(first_byte_seconds=read.first_byte_seconds + more_seconds * (number % every == every - 1))
                for number, read in enumerate(rank.reads)
            ),
        )
        for rank in node.ranks
    )
    return replace(node, ranks=tuple(ranks))


def check(folder: Path, cases: Sequence[Small] = SMALL, *, num_rounds: int) -> list[Checked]:
    """Makes every case in every round, and simulates it."""
    folder = write_checkpoint(folder, [TensorSpec("up_proj.weight", "F32", (CHECKPOINT_MIB * 64, 4096))])
    (file,) = folder.glob("*.safetensors")
    memory = measure_memory(has_gpu=False)
    measured: dict[str, list[float]] = {small.name: [] for small in cases}
    with start_s3_server() as server:
        os.environ |= server.environment()
        processes = Processes(max(small.num_nodes * small.num_apart * small.num_ranks for small in cases))
        # A file, since proxies of this kind pass no listings on.
        uri = f"{server.upload_folder(folder, 'cold-starts', 'model')}/{file.name}"
        predicted = {small.name: predict(small, uri, memory) for small in cases}
        for number in range(num_rounds + 1):
            for small in cases if number else cases[:1]:
                with FaultProcess(server.endpoint_url, bytes_per_second=small.storage_rate) as proxy:
                    seconds = processes.load(small, uri, proxy)
                if number:
                    measured[small.name].append(seconds)
        processes.close()
    return [
        Checked(
            name=small.name,
            predicted_seconds=predicted[small.name],
            measured_seconds=tuple(measured[small.name]),
        )
        for small in cases
    ]


def check_here(*, num_rounds: int) -> list[Checked]:
    """The same in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="cold-starts-") as folder:
        return check(Path(folder), num_rounds=num_rounds)
