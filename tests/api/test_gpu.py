"""`load_rank` and a rank's worker on a GPU, whose CUDA runtime is one without a GPU; what Ray does is tested with the cluster."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from api_support import oracle

import ray_streamer
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.planning.topology import Topology
from ray_streamer.rank import request as request_module
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.rank.request import LoadRequest
from ray_streamer.sharding import Mesh
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.storage.posix import PosixStorage
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.device.base import Device

WAIT_SECONDS = 30.0
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def use_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeCuda], None]:
    """Makes "cuda" in this process a device on that runtime."""

    def use(library: FakeCuda) -> None:
        def opened(name: str, *, gpu_direct_storage: bool, **options: Any) -> Device:
            assert name == "cuda"
            return open_fake_cuda(library, **options)

        monkeypatch.setattr(request_module, "open_device", opened)

    return use


def test_a_rank_loads_onto_its_gpu(checkpoint, use_library) -> None:
    library = FakeCuda()
    use_library(library)
    mine = torch.zeros(1001, 256, dtype=torch.bfloat16)
    tensors = ray_streamer.load_rank(checkpoint.uri, device="cuda", out={EMBEDDING: mine})
    assert oracle.faults(tensors, checkpoint.uri) == []
    assert tensors[EMBEDDING] is mine
    assert not library.locked
    # Files that are in the page cache were read into page-locked memory all the same.
    assert library.count("HostRegister") >= 1


def test_tensors_that_were_yielded_are_whole(checkpoint, use_library) -> None:
    use_library(FakeCuda())
    seen = {name: tensor.clone() for name, tensor in ray_streamer.stream_rank(checkpoint.uri, device="cuda")}
    assert oracle.faults(seen, checkpoint.uri) == []


def test_the_gpu_starts_while_headers_are_read(checkpoint, use_library, monkeypatch) -> None:
    """Its start ends only when a header was read: one that planning waited for would wait for ever."""
    read = threading.Event()
    waited: list[bool] = []
    read_head = PosixStorage.read_head

    def told(self: PosixStorage, path: str, max_bytes: int) -> Any:
        read.set()
        return read_head(self, path, max_bytes)

    monkeypatch.setattr(PosixStorage, "read_head", told)
    use_library(FakeCuda(before={"StreamCreateWithFlags": lambda: waited.append(read.wait(WAIT_SECONDS))}))
    tensors = ray_streamer.load_rank(checkpoint.uri, device="cuda")
    assert oracle.faults(tensors, checkpoint.uri) == []
    assert waited == [True]


@pytest.mark.parametrize("scratch", [0, 1 << 16])
def test_a_worker_keeps_its_tensors_on_the_gpu(checkpoint, use_library, scratch: int) -> None:
    library = FakeCuda()
    use_library(library)
    request = LoadRequest(
        uri=checkpoint.uri,
        mesh=Mesh(tp=2),
        slices=RuleSlices(mesh=Mesh(tp=2)),
        settings=ray_streamer.Settings(memory_limit=1 << 20, device_scratch_bytes=scratch),
        device="cuda",
    )
    worker = LoadWorker(1, request)
    terms = MemoryTerms(1 << 20, request.read_limits((1 << 20, 1 << 20)))
    index_bytes = worker.read_index(request)
    plan = request.plan(Topology.even(2, 2), memory_limits=(1 << 20, 1 << 20))
    for session in ("first", "again"):
        place = Place(session=session, rank=1, ranks=(1,), node="here", timeouts=Timeouts.of(request.settings))
        agreed = worker.agree(request, index_bytes, place, terms)
        assert (agreed.node_plan_hash, agreed.slices_hash) == (
            plan.node_plan_of(1)[0].plan_hash,
            plan.slices[1].fingerprint(),
        )
        assert worker.load(agreed.agreement).bytes_delivered == plan.rank_plan(1).bytes_to_fill.sum()
        context = worker.run(lambda context: context, ())
        assert context.device == "cuda:0"
        assert oracle.faults(context.tensors, checkpoint.uri, tp_index=1, tp=2) == []
        assert not library.locked
    mine = context.tensors[EMBEDDING]
    assert worker.take_bytes(EMBEDDING) == bytes(mine.view(torch.uint8).numpy())
    # Rows of a few hundred bytes: packed, or cut by a second copy on the device.
    assert bool([call for call in library.calls if call.name == "Memcpy2DAsync" and call.arguments[6] == 3]) == bool(
        scratch
    )
