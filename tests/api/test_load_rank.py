"""`load_rank` and `stream_rank` in processes that Ray knows nothing of."""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from api_support import oracle, rank_tasks
from api_support.processes import RankProcesses

import ray_streamer
from ray_streamer.errors import (
    ClusterError,
    DeviceError,
    ObjectMissingError,
    RankFailedError,
    SettingsError,
    StartupTimeoutError,
)
from ray_streamer.planning.summary import summarize
from ray_streamer.testing.faults import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ_TIMEOUT_SECONDS = 600.0
"""Longer than any test may take: whoever waited for it would be found hanging."""

STALLED = [
    pytest.param(0, id="while-the-failed-rank-waits-for-the-network"),
    pytest.param(1, id="while-the-other-rank-waits-for-the-network"),
]
"""Which of two ranks waits for a body that does not come."""

RUN_ID = secrets.token_hex(8)
"""Another run of these tests on this machine is another job."""

NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "model.scale"]


@pytest.fixture(params=["page-cache", "reads"])
def settings(request: pytest.FixtureRequest) -> ray_streamer.Settings:
    return ray_streamer.Settings(
        page_cache="on" if request.param == "page-cache" else "off",
        memory_limit=1 << 20,
        concurrency=3,
        startup_timeout_seconds=30,
    )


@pytest.fixture
def numbered() -> list[dict[str, Any]]:
    """The arguments by which two processes become ranks of one load."""
    session = secrets.token_hex(8)
    return [{"rank": rank, "world_size": 2, "session": session} for rank in range(2)]


def launched(*, local_world_size: int = 2) -> list[dict[str, str]]:
    """What torchrun puts into the environment of two processes."""
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank % local_world_size),
            "LOCAL_WORLD_SIZE": str(local_world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
            "TORCHELASTIC_RUN_ID": RUN_ID,
        }
        for rank in range(2)
    ]


def test_ranks_from_the_environment_of_a_launcher(
    pair: RankProcesses, checkpoint: Any, settings: ray_streamer.Settings
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "settings": settings}
    ranks = [{"environment": launched()[rank], "tp_index": rank, **common} for rank in range(2)]
    assert pair.run(rank_tasks.load, ranks) == [[], []]
    # The second load of the same processes is a session of its own.
    assert pair.run(rank_tasks.load, ranks) == [[], []]


def test_two_nodes_that_share_a_machine_stay_apart(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    environments = launched(local_world_size=1)
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "trace": tmp_path / "trace.json"}
    ranks = [{"environment": environments[rank], "tp_index": rank, **common} for rank in range(2)]
    assert pair.run(rank_tasks.load, ranks) == [[], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.node-0.json", "trace.node-1.json"]


def test_ranks_from_arguments(
    pair: RankProcesses, checkpoint: Any, settings: ray_streamer.Settings, numbered: list[dict[str, Any]]
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "settings": settings}
    ranks = [{"tp_index": rank, **numbered[rank], **common} for rank in range(2)]
    assert pair.run(rank_tasks.load, ranks) == [[], []]


def test_a_trace_of_all_ranks_of_the_node_is_written_by_the_first(
    pair: RankProcesses, checkpoint: Any, numbered: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    settings = ray_streamer.Settings(page_cache="off")
    arguments = {"uri": checkpoint.uri, "folder": checkpoint.uri, "trace": file, "settings": settings}
    per_rank = [arguments | rank | {"tp_index": rank["rank"]} for rank in numbered]
    assert pair.run(rank_tasks.load, per_rank) == [[], []]
    events = json.loads(file.read_text())["traceEvents"]
    processes = [event["args"]["name"].split(" on ")[0] for event in events if event["name"] == "process_name"]
    assert processes == ["rank 0", "rank 1"]
    reads = [event for event in events if event.get("cat") == "read" and event["name"].startswith("block ")]
    assert {event["pid"] for event in reads} == {0, 1}
    assert sum(event["args"]["stop"] - event["args"]["start"] for event in reads) == checkpoint.num_bytes


def test_a_trace_that_one_rank_alone_is_asked_for_costs_no_tensors(
    pair: RankProcesses, checkpoint: Any, numbered: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    arguments = {"uri": checkpoint.uri, "folder": checkpoint.uri}
    per_rank = [arguments | rank | {"tp_index": rank["rank"]} for rank in numbered]
    per_rank[0]["trace"] = file
    assert pair.run(rank_tasks.load, per_rank) == [[], []]
    assert not file.exists()


def test_a_trace_that_cannot_be_written_is_refused_on_all_ranks(
    pair: RankProcesses, checkpoint: Any, numbered: list[dict[str, Any]], tmp_path: Path
) -> None:
    arguments = {"uri": checkpoint.uri, "folder": checkpoint.uri, "trace": tmp_path / "nowhere" / "trace.json"}
    first, second = pair.run(rank_tasks.load, [arguments | rank | {"tp_index": rank["rank"]} for rank in numbered])
    assert isinstance(first, SettingsError)
    assert "cannot be written: No such file or directory" in str(first)
    assert isinstance(second, RankFailedError)
    assert second.rank == 0


def test_replicas(pair: RankProcesses, checkpoint: Any, numbered: list[dict[str, Any]]) -> None:
    ranks = [{"uri": checkpoint.uri, "folder": checkpoint.uri, "tp": 1, "tp_index": 0, **each} for each in numbered]
    assert pair.run(rank_tasks.load, ranks) == [[], []]


def test_ranks_from_a_process_group(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "store": str(tmp_path / "store"), "world_size": 2}
    ranks = [{"rank": rank, **common} for rank in range(2)]
    assert pair.run(rank_tasks.load_in_process_group, ranks) == [[[], []], [[], []]]


def test_a_process_group_meets_the_planning_error_of_its_first_rank(pair: RankProcesses, tmp_path: Path) -> None:
    common = {"uri": str(tmp_path / "nothing"), "folder": "", "store": str(tmp_path / "store"), "world_size": 2}
    errors = pair.run(rank_tasks.load_in_process_group, [{"rank": rank, **common} for rank in range(2)])
    assert [type(error) for error in errors] == [ObjectMissingError] * 2
    assert all("nothing" in str(error) for error in errors)


@pytest.mark.parametrize("dtypes", [(None, None), ("float16", None)], ids=["alike", "not alike"])
def test_ranks_of_a_process_group_on_two_machines_are_given_the_same(
    pair: RankProcesses, checkpoint: Any, tmp_path: Path, dtypes: tuple[str | None, str | None]
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "store": str(tmp_path / "store")}
    ranks = [{"rank": rank, "dtype": dtype, **common} for rank, dtype in enumerate(dtypes)]
    first, second = pair.run(rank_tasks.load_on_a_machine_of_its_own, ranks)
    if dtypes[0] == dtypes[1]:
        assert first == second == []
    else:
        assert isinstance(second, ClusterError)
        assert "rank 0 was given other dtype than rank 1" in str(second)


@pytest.mark.parametrize("is_alive", [True, False], ids=["does something else", "left"])
def test_a_rank_of_a_process_group_that_does_not_come(
    pair: RankProcesses, checkpoint: Any, tmp_path: Path, is_alive: bool
) -> None:
    common = {"uri": checkpoint.uri, "store": str(tmp_path / "store"), "is_alive": is_alive}
    said, _ = pair.run(rank_tasks.load_without_the_other, [{"rank": rank, **common} for rank in range(2)])
    assert "the ranks of the process group did not tell each other where each rank runs" in said
    assert "RuntimeError: " in said
    assert "each rank must call the load" in said


def test_a_group_that_the_caller_names(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "store": str(tmp_path / "store"), "world_size": 2}
    for loaded in pair.run(rank_tasks.load_in_groups, [{"rank": rank, **common} for rank in range(2)]):
        assert loaded["together"] == loaded["alone"] == []
        assert "no member of the process group" in loaded["refused"][0]


def test_a_group_and_a_rank_are_not_both_given(checkpoint: Any) -> None:
    group: Any = object()
    with pytest.raises(SettingsError, match="give group, or rank and world_size, not both"):
        ray_streamer.load_rank(checkpoint.uri, rank=0, world_size=1, group=group)


@pytest.mark.parametrize(
    ("first_attempt", "outcomes"),
    [
        pytest.param({"uri": "/no/such/checkpoint"}, [2, 2], id="failed-after-they-met"),
        pytest.param({"device": "tpu"}, [2, 1], id="failed-before-they-met"),
        pytest.param({"tp": 3}, [2, 1], id="asked-for-nonsense"),
    ],
)
def test_a_rank_that_tries_again_meets_the_rest(
    pair: RankProcesses, checkpoint: Any, first_attempt: dict[str, Any], outcomes: list[int]
) -> None:
    """Only the first rank's first attempt fails by itself; where the other one was not met yet, it notices nothing."""
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri}
    attempts = [[first_attempt, {}, {}], [{}, {}, {}]]
    ranks = [
        {"environment": launched()[rank], "tp_index": rank, "attempts": attempts[rank], **common} for rank in range(2)
    ]
    answers = pair.run(rank_tasks.load_in_attempts, ranks)
    assert [len(answer) for answer in answers] == outcomes, answers
    assert [answer[-1] for answer in answers] == [[], []]


def test_processes_that_share_nothing_but_a_name_read_the_headers_once(checkpoint: Any, s3_credentials: Any) -> None:
    if s3_credentials.kind != "rgw":
        pytest.skip("only RADOS Gateway counts what it is asked")
    uri = s3_credentials.upload_folder(checkpoint.folder, "headers-once")
    settings = ray_streamer.Settings(
        s3_endpoint_url=s3_credentials.endpoint_url, memory_limit=1 << 20, block_bytes=256 << 10, hedge_percent=0
    )
    before = s3_credentials.requests()
    plan = ray_streamer.plan(uri, 4, settings=settings)
    num_header_requests = s3_credentials.requests() - before
    common = {"uri": uri, "folder": checkpoint.uri, "tp": 4, "world_size": 4, "session": secrets.token_hex(8)}
    with RankProcesses(4) as processes:
        for rank in range(4):
            processes.order(
                rank,
                rank_tasks.load,
                rank=rank,
                tp_index=rank,
                settings=settings,
                environment=s3_credentials.environment(),
                **common,
            )
        before = s3_credentials.requests()
        assert [processes.answer(rank) for rank in range(4)] == [[]] * 4
    assert s3_credentials.requests() - before == num_header_requests + summarize(plan).requests


def test_a_world_of_one(checkpoint: Any) -> None:
    assert oracle.faults(ray_streamer.load_rank(checkpoint.uri), checkpoint.uri) == []
    streamed = dict(ray_streamer.stream_rank(checkpoint.uri, settings=ray_streamer.Settings(page_cache="off")))
    assert oracle.faults(streamed, checkpoint.uri) == []


@pytest.mark.parametrize(
    "writer",
    [
        "rank.agreement.index_to_bytes",
        "planning.node_plan.columns_to_bytes",
        "slices.rank_sources.columns_to_bytes",
    ],
)
def test_a_world_of_one_writes_nothing_for_other_ranks(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def refuse(*_: Any) -> bytes:
        raise AssertionError("nobody reads it")

    monkeypatch.setattr(f"ray_streamer.{writer}", refuse)
    assert oracle.faults(ray_streamer.load_rank(checkpoint.uri), checkpoint.uri) == []


def test_tensors_land_in_memory_of_the_caller(
    pair: RankProcesses, checkpoint: Any, settings: ray_streamer.Settings, numbered: list[dict[str, Any]]
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "names": NAMES, "settings": settings}
    holds = {"right": True, "same tensors": True, "statistics": True}
    assert pair.run(rank_tasks.load_into_own_memory, [each | common for each in numbered]) == [holds, holds]


def test_memory_of_the_caller_that_does_not_fit_leaves_nothing(pair: RankProcesses, checkpoint: Any) -> None:
    pair.order(0, rank_tasks.load_with_wrong_out, uri=checkpoint.uri)
    message, left = pair.answer(0)
    assert "out['model.norm.weight'] on rank 0 must have shape (256,) and dtype torch.bfloat16, got (3,)" in message
    assert left == []


def test_a_stream_gives_each_tensor_once_and_complete(
    pair: RankProcesses, checkpoint: Any, settings: ray_streamer.Settings, numbered: list[dict[str, Any]]
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri, "settings": settings}
    for streamed in pair.run(rank_tasks.stream, [each | common for each in numbered]):
        assert Counter(streamed["names"]) == Counter(checkpoint.names)
        assert streamed["wrong"] == []


class Endless:
    """A checkpoint of which one body never ends, so that no rank can be done.

    Attributes:
        gate: A pipe at which ranks wait until `stalled`.
    """

    def __init__(self, server: Any, uri: str, proxy: FaultProxy, gate: str) -> None:
        self._server, self._uri, self._proxy = server, uri, proxy
        self.gate = gate

    def arguments(self, *, is_stalled: bool, reads_headers: bool = True) -> dict[str, Any]:
        """What a rank is given, one that waits for that body or one whose reads all succeed."""
        endpoint_url = self._proxy.url if is_stalled else self._server.endpoint_url
        settings = ray_streamer.Settings(
            s3_endpoint_url=endpoint_url,
            concurrency=2,
            memory_limit=1 << 20,
            stall_timeout_seconds=READ_TIMEOUT_SECONDS,
        )
        if is_stalled:
            ray_streamer.plan(self._uri, settings=settings)
            num_headers = len(self._proxy.ranges) if reads_headers else 0
            # The rank reads the headers, if it is the first one, and one block, and then waits for the second one.
            self._proxy.fail_next(*[Fault()] * (num_headers + 1), Fault(body_bytes=1000, end="stall"))
        return {"uri": self._uri, "settings": settings, "environment": self._server.environment()}

    def wait_until_stalled(self) -> None:
        self._proxy.wait_until_stalled()

    def open_gate(self) -> None:
        """Let whoever waits at the gate go on, when the load is in its middle."""
        self.wait_until_stalled()
        with open(self.gate, "w"):
            pass


@pytest.fixture
def endless(checkpoint: Any, s3_credentials: Any, tmp_path: Path) -> Iterator[Endless]:
    uri = s3_credentials.upload_folder(checkpoint.folder, "endless")
    os.mkfifo(tmp_path / "gate")
    with FaultProxy(s3_credentials.endpoint_url) as proxy:
        yield Endless(s3_credentials, uri, proxy, str(tmp_path / "gate"))


def test_a_stream_that_is_closed_early_leaves_nothing(pair: RankProcesses, checkpoint: Any, endless: Endless) -> None:
    pair.order(0, rank_tasks.stream_one_and_close, gate=endless.gate, **endless.arguments(is_stalled=True))
    endless.open_gate()
    closed = pair.answer(0)
    assert closed["name"] in checkpoint.names
    assert [name for name in closed["during"] if name.startswith("ray_streamer-0-read")]
    assert not Counter(closed["after"]) - Counter(closed["before"])


def test_streams_that_are_dropped_in_cycles_leave_nothing(pair: RankProcesses, checkpoint: Any) -> None:
    """The collector runs when it likes, in a thread of a load as well as in any other."""
    settings = ray_streamer.Settings(page_cache="off", memory_limit=64 << 10, block_bytes=4096, concurrency=4)
    pair.order(0, rank_tasks.drop_streams_in_cycles, uri=checkpoint.uri, num_streams=20, settings=settings)
    assert pair.answer(0) == []


@pytest.mark.parametrize("stalled", STALLED)
def test_a_rank_that_fails_in_its_loop_is_named_by_the_other(
    pair: RankProcesses, endless: Endless, numbered: list[dict[str, Any]], stalled: int
) -> None:
    arguments = [
        each | endless.arguments(is_stalled=rank == stalled, reads_headers=rank == 0)
        for rank, each in enumerate(numbered)
    ]
    pair.order(0, rank_tasks.stream_one_and_raise, gate=endless.gate, **arguments[0])
    pair.order(1, rank_tasks.stream_all, **arguments[1])
    endless.open_gate()
    assert type(pair.answer(0)) is LookupError
    told = pair.answer(1)
    assert type(told) is RankFailedError
    assert told.rank == 0
    assert "the caller of rank 0 stopped taking tensors" in str(told)


@pytest.mark.parametrize("stalled", STALLED)
def test_a_rank_that_is_killed_is_named_by_the_other(
    pair: RankProcesses, endless: Endless, numbered: list[dict[str, Any]], stalled: int
) -> None:
    arguments = [
        each | endless.arguments(is_stalled=rank == stalled, reads_headers=rank == 0)
        for rank, each in enumerate(numbered)
    ]
    with RankProcesses(1) as victim:
        victim.order(0, rank_tasks.stream_all, **arguments[0])
        pair.order(1, rank_tasks.stream_all, **arguments[1])
        endless.wait_until_stalled()
        os.kill(victim.pids[0], signal.SIGKILL)
        told = pair.answer(1)
    assert type(told) is RankFailedError
    assert told.rank == 0


def test_a_rank_that_does_not_come_is_named(checkpoint: Any) -> None:
    settings = ray_streamer.Settings(startup_timeout_seconds=0.2)
    with pytest.raises(StartupTimeoutError, match=r"ranks \[1\] .* startup_timeout_seconds=0\.2"):
        ray_streamer.load_rank(checkpoint.uri, rank=0, world_size=2, session=secrets.token_hex(8), settings=settings)


def test_ranks_with_different_limits_load_by_those_of_the_first(
    pair: RankProcesses, checkpoint: Any, numbered: list[dict[str, Any]]
) -> None:
    common = {"uri": checkpoint.uri, "folder": checkpoint.uri}
    ranks = [
        {**numbered[rank], **common, "tp_index": rank}
        | {"settings": ray_streamer.Settings(block_bytes=size, startup_timeout_seconds=60)}
        for rank, size in enumerate((64 << 10, 32 << 10))
    ]
    assert pair.run(rank_tasks.load, ranks) == [[], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"rank": 0}, "give rank and world_size, or neither", id="rank-alone"),
        pytest.param({"world_size": 2}, "give rank and world_size, or neither", id="world-size-alone"),
        pytest.param({"rank": 0, "world_size": 2}, "give session", id="no-session"),
        pytest.param({"rank": 2, "world_size": 2, "session": "s"}, "rank=2 world_size=2", id="rank-out-of-range"),
        pytest.param({"rank": -1, "world_size": 2, "session": "s"}, "rank=-1", id="negative-rank"),
        pytest.param(
            {"rank": 0, "world_size": 3, "local_world_size": 2, "session": "s"},
            "local_world_size=2",
            id="nodes-of-different-sizes",
        ),
        pytest.param(
            {"rank": 0, "world_size": 2, "local_world_size": 0, "session": "s"}, "local_world_size=0", id="empty-nodes"
        ),
        pytest.param({"rank": 0, "world_size": 1, "tp": 2}, "tp=2 does not divide the 1 rank of", id="tp-too-large"),
        pytest.param({"rank": 0, "world_size": 1, "tp": 0}, "tp=0 does not divide", id="tp-zero"),
    ],
)
def test_a_place_that_cannot_be(checkpoint: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ray_streamer.load_rank(checkpoint.uri, **arguments)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"RANK": "0"}, id="no-world-size"),
        pytest.param({"WORLD_SIZE": "2"}, id="no-rank"),
        pytest.param({"RANK": "zero", "WORLD_SIZE": "2"}, id="no-number"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1_0"}, id="digits-of-python"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "two"}, id="no-local-number"),
    ],
)
def test_an_environment_that_says_half(
    checkpoint: Any, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be whole numbers, all or none"):
        ray_streamer.load_rank(checkpoint.uri)


def test_arguments_that_do_not_exist_are_not_ignored(checkpoint: Any) -> None:
    unknown: Any = {"memory_limits": 1 << 20}
    with pytest.raises(TypeError, match="memory_limits"):
        ray_streamer.load_rank(checkpoint.uri, **unknown)


def test_a_device_that_does_not_exist(checkpoint: Any) -> None:
    with pytest.raises(DeviceError, match="'tpu' is not supported"):
        ray_streamer.load_rank(checkpoint.uri, device="tpu")
