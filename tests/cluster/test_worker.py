"""Workers without Ray: two ranks of a node agree, load, and load again into the same tensors while they stay met."""

from __future__ import annotations

import gc
import re
import secrets
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ray_streamer
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.errors import (
    ClusterError,
    DeviceError,
    LoadAbortedError,
    ObjectChangedError,
    RankFailedError,
    RayStreamerError,
)
from ray_streamer.exchange.liveness import Activity, Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.rank.device_start import DeviceStart
from ray_streamer.rank.request import LoadRequest
from ray_streamer.sharding import Mesh
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.staging.stop import StopSignal
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.oracle import bytes_of, expected_results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYOUT = llama_layout(64, 1, 4, 2, 128, 100)
LIMIT = 1 << 20
HANG_SECONDS = 60.0


class Pair:
    """Two workers, each called from a thread of its own, as actors are."""

    def __init__(self, folder: Path) -> None:
        settings = ray_streamer.Settings(memory_limit=LIMIT, page_cache="off", startup_timeout_seconds=HANG_SECONDS)
        mesh = Mesh(tp=2)
        self.request = LoadRequest(
            uri=str(folder), mesh=mesh, slices=RuleSlices(mesh=mesh), settings=settings, device="cpu"
        )
        self.workers = [LoadWorker(rank, self.request) for rank in range(2)]
        self._threads = ThreadPoolExecutor(2)
        # The same tests may run beside these.
        self._name = secrets.token_hex(8)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self._threads.shutdown()

    def both(self, method: str, *args: Any) -> list[Any]:
        """What each worker returned or raised."""
        return self.each(method, [args] * len(self.workers))

    def each(self, method: str, args_by_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What each worker returned or raised."""
        calls = [
            self._threads.submit(getattr(worker, method), *args)
            for worker, args in zip(self.workers, args_by_rank, strict=True)
        ]
        return [call.exception(HANG_SECONDS) or call.result() for call in calls]

    def agree(self, folder: Path, session: str) -> list[Any]:
        request = replace(self.request, uri=str(folder))
        terms = MemoryTerms(LIMIT, request.read_limits([LIMIT]))
        index_bytes, timeouts = self.workers[0].read_index(request), Timeouts.of(request.settings)
        name = f"{self._name}/{session}"
        places = [Place(session=name, rank=rank, ranks=(0, 1), node="here", timeouts=timeouts) for rank in range(2)]
        return self.each("agree", [(request, index_bytes, place, terms) for place in places])

    def load(self, folder: Path, session: str) -> list[Any]:
        agreed = self.agree(folder, session)
        assert agreed[0].node_plan_hash == agreed[1].node_plan_hash
        return self.load_agreed(agreed)

    def load_agreed(self, agreed: list[Any]) -> list[Any]:
        return self.each("load", [(digest.agreement,) for digest in agreed])

    def tensors(self) -> list[dict[str, torch.Tensor]]:
        return [worker.run(lambda context: context.tensors, ()) for worker in self.workers]

    def expect_content(self, folder: Path) -> None:
        index = replace(self.request, uri=str(folder)).open_index()
        for rank, tensors in enumerate(self.tensors()):
            expected = expected_results(folder, index, self.request.slices(index, rank))
            assert {name: bytes_of(tensor) for name, tensor in tensors.items()} == {
                name: bytes_of(tensor) for name, tensor in expected.items()
            }


def addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The same tensors with other bytes."""
    return [
        write_checkpoint(tmp_path / f"step-{seed}", LAYOUT.tensors, seed=seed, config=LAYOUT.config)
        for seed in range(2)
    ]


@pytest.fixture
def pair(folders: list[Path], request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(folders[0])
    yield pair
    pair.close()


def test_a_second_load_fills_the_same_tensors_over_the_same_session(pair: Pair, folders: list[Path]) -> None:
    first = pair.load(folders[0], "secret/0")
    pair.expect_content(folders[0])
    before, sessions = [addresses(held) for held in pair.tensors()], [worker.session for worker in pair.workers]
    gc.collect()  # An error that another test caught may keep a view of its arena in a cycle.
    assert "ray_streamer-arena" not in Path("/proc/self/maps").read_text(), "staging memory is given back"
    second = pair.load(folders[1], "secret/0")
    pair.expect_content(folders[1])
    assert [addresses(held) for held in pair.tensors()] == before
    assert [worker.session for worker in pair.workers] == sessions
    for earlier, later in zip(first, second, strict=True):
        assert later.bytes_delivered == later.bytes_to_deliver == earlier.bytes_delivered
        assert later.peak_staging_bytes <= LIMIT


def test_workers_say_what_they_do_while_they_take_part_in_a_load(pair: Pair, folders: list[Path]) -> None:
    assert [worker.pulse() for worker in pair.workers] == [None, None]
    agreed = pair.agree(folders[0], "secret/0")
    pulses = [worker.pulse() for worker in pair.workers]
    assert [pulse and pulse.phase for pulse in pulses] == ["planning", "planning"]
    pair.load_agreed(agreed)
    assert [worker.pulse() for worker in pair.workers] == [None, None]


def test_another_secret_is_another_meeting(pair: Pair, folders: list[Path]) -> None:
    pair.load(folders[0], "one/0")
    sessions = [worker.session for worker in pair.workers]
    pair.load(folders[1], "two/0")
    pair.expect_content(folders[1])
    for worker, earlier in zip(pair.workers, sessions, strict=True):
        assert worker.session is not earlier
    assert not [thread for thread in threading.enumerate() if "hub" in thread.name][2:]


def test_tensors_of_another_form_are_made_anew_and_what_is_gone_is_dropped(
    pair: Pair, folders: list[Path], tmp_path: Path
) -> None:
    pair.load(folders[0], "secret/0")
    before = [addresses(held) for held in pair.tensors()]
    layout = llama_layout(64, 1, 4, 2, 256, 100)
    wider = write_checkpoint(tmp_path / "wider", layout.tensors, config=layout.config)
    pair.load(wider, "secret/0")
    pair.expect_content(wider)
    norm = "model.norm.weight"
    assert [addresses(held)[norm] for held in pair.tensors()] == [held[norm] for held in before]


def test_what_a_function_made_of_the_tensors_is_no_obstacle(pair: Pair, folders: list[Path]) -> None:
    pair.load(folders[0], "secret/0")
    held = pair.tensors()[0]
    names = list(held)
    del held[names[0]]
    held[names[1]] = held[names[1]].to(torch.float64)
    held[names[2]] = held[names[3]]
    held["mine"] = torch.zeros(3)
    pair.load(folders[1], "secret/0")
    pair.expect_content(folders[1])


def test_a_load_that_fails_leaves_no_tensors_and_the_next_one_succeeds(pair: Pair, folders: list[Path]) -> None:
    pair.load(folders[0], "secret/0")
    agreed = pair.agree(folders[1], "secret/0")
    write_checkpoint(folders[1], LAYOUT.tensors, seed=7, config=LAYOUT.config)
    outcomes = pair.load_agreed(agreed)
    assert all(isinstance(outcome, RankFailedError | ObjectChangedError) for outcome in outcomes)
    assert any(isinstance(outcome, ObjectChangedError) for outcome in outcomes)
    for worker in pair.workers:
        with pytest.raises(RayStreamerError, match="holds no tensors"):
            worker.run(lambda context: context, ())
    pair.load(folders[1], "again/0")
    pair.expect_content(folders[1])


def test_a_load_of_another_agreement_is_refused_and_costs_nothing(pair: Pair, folders: list[Path]) -> None:
    earlier, later = pair.agree(folders[0], "secret/0"), pair.agree(folders[1], "secret/0")
    assert [type(outcome) for outcome in pair.load_agreed(earlier)] == [ClusterError, ClusterError]
    pair.load_agreed(later)
    pair.expect_content(folders[1])
    for rank, outcome in enumerate(pair.load_agreed(later)):
        assert re.search(rf"rank {rank} agreed on another load meanwhile.*begin one when", str(outcome))
    pair.expect_content(folders[1])


def test_an_abort_between_loads_ends_nothing_once_it_is_forgotten(pair: Pair, folders: list[Path]) -> None:
    pair.load(folders[0], "secret/0")
    session = pair.workers[0].session
    for worker in pair.workers:
        worker.abort("a function of rank 1 failed")
    assert all(isinstance(outcome, LoadAbortedError) for outcome in pair.agree(folders[1], "secret/0"))
    pair.both("forget_abort")
    pair.load(folders[1], "again/0")
    pair.expect_content(folders[1])
    assert pair.workers[0].session is not session


def test_a_device_that_did_not_come_up_is_told_by_the_load_and_not_by_the_agreement(
    pair: Pair, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the failure of a rank, however soon it fails; what is wrong with the request is not."""

    def fail() -> Any:
        raise DeviceError("no such device")

    with monkeypatch.context() as actor_that_has_begun:
        actor_that_has_begun.delitem(sys.modules, "torch")
        device = DeviceStart(fail, wants_staging=False, timeout_seconds=HANG_SECONDS)
    with pytest.raises(DeviceError):
        device.wait(StopSignal(), Activity())
    for worker in pair.workers:
        worker._device = device
    agreed = pair.agree(folders[0], "first")
    errors = pair.load_agreed(agreed)
    # A rank may hear of the other one's before its own.
    assert [type(getattr(error, "cause", error)) for error in errors] == [DeviceError] * 2
