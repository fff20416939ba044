"""The parts of a trace come together over a group: its workers are real and loaded, only Ray is left out."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest

from ray_streamer.cluster.clocks import ClockReading, read_clock
from ray_streamer.cluster.phases import Phases
from ray_streamer.cluster.tracing import collect_trace
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.errors import ClusterError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, ShardRules, Split
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

MEMORY_LIMIT = 1 << 20


class FarWorker(LoadWorker):
    """A rank of another machine, whose clock happens to show what ours does."""

    def clock(self) -> ClockReading:
        return read_clock()._replace(boot="another machine")


class Group:
    """What a trace needs of a group, with workers of this process: each is alone on its node."""

    nodes = ((0,), (1,))
    num_ranks = 2

    def __init__(self, workers: list[LoadWorker]) -> None:
        self._workers = workers

    def call(self, method, *, ranks=(0, 1), keep_on_failure):
        assert keep_on_failure, "a trace that fails must not end the ranks"
        answers = [getattr(self._workers[rank], method)() for rank in ranks]
        return pickle.loads(pickle.dumps(answers))


@pytest.fixture
def workers(tmp_path) -> list[LoadWorker]:
    tensors = [TensorSpec("model.layers.0.mlp.up_proj.weight", "F32", (64, 32)), TensorSpec("scale", "F32", (3,))]
    write_checkpoint(tmp_path / "checkpoint", tensors)
    request = LoadRequest(
        uri=str(tmp_path / "checkpoint"),
        mesh=Mesh(tp=2),
        slices=RuleSlices(mesh=Mesh(tp=2), rules=ShardRules({"*.up_proj.weight": Split(0)})),
        settings=Settings(memory_limit=MEMORY_LIMIT, page_cache="off"),
        device="cpu",
    )
    return [LoadWorker(0, request), FarWorker(1, request)]


def test_every_rank_is_drawn_with_the_clock_of_its_node(workers, tmp_path):
    phases = Phases()
    for rank, worker in enumerate(workers):
        terms = MemoryTerms(MEMORY_LIMIT, worker._request.read_limits((MEMORY_LIMIT,)))
        place = Place(
            session=f"traced-{rank}-{tmp_path.name}",
            rank=rank,
            ranks=(rank,),
            node=f"node-{rank}",
            timeouts=Timeouts.of(worker._request.settings),
        )
        agreed = worker.agree(worker._request, worker.read_index(worker._request), place, terms)
        phases.end("plan")
        worker.load(agreed.agreement)
        phases.end("load")
    trace = collect_trace(Group(workers), "file:///checkpoint", phases)
    assert trace.offsets[0] == (0.0, 0.0)
    assert trace.offsets[1].error_seconds > 0
    assert abs(trace.offsets[1].seconds) <= trace.offsets[1].error_seconds
    assert [part.rank for part in trace.ranks] == [0, 1]
    trace.write(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["otherData"]["uri"] == "file:///checkpoint"
    for rank, worker in enumerate(workers):
        read = [
            event["args"]["stop"] - event["args"]["start"]
            for event in written["traceEvents"]
            if event.get("cat") == "read" and event["pid"] == rank and event["name"].startswith("block ")
        ]
        assert sum(read) == worker.progress().bytes_read > 0


def test_phases_follow_each_other_from_the_first_reading_of_the_clock():
    phases = Phases()
    for name in ("check", "ray", "load"):
        phases.end(name, of_which={"import": 0.0} if name == "load" else None)
    spans, seconds = phases.spans(), phases.seconds()
    assert [name for name, _, _ in spans] == ["check", "ray", "import", "load"]
    assert all(stop == start for (_, _, stop), (_, start, _) in pairwise(spans))
    assert {name: stop - start for name, start, stop in spans} == pytest.approx(
        {name: seconds[name] for name, _, _ in spans}
    )
    assert spans[-1][2] - spans[0][1] == pytest.approx(seconds["total"])


def test_a_rank_that_loaded_nothing_cannot_be_drawn(workers):
    with pytest.raises(ClusterError, match="rank 0 has loaded nothing"):
        workers[0].trace()
