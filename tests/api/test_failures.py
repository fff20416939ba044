"""Something breaks in the middle of a load: the caller reads who, where and why, and nothing stays behind.

Loads are held in their middle by an S3 server behind a proxy that stops sending one body.
"""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
from api_support import oracle
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from safetensors.torch import load_file

import ray_streamer
from ray_streamer.errors import ClusterError, ObjectChangedError, RankFailedError
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.testing.possessions import package_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray.util.placement_group import PlacementGroup

    from ray_streamer import ShardedModel

pytestmark = pytest.mark.usefixtures("local_ray")

ARENA = "/memfd:ray_streamer-arena"
HANG_SECONDS = 120.0

_num_buckets = itertools.count()


@dataclass(frozen=True)
class Possessions:
    """What ranks hold while they load.

    Attributes:
        pids: Their processes.
        sockets: Names of their sockets.
        arenas: Inodes of their staging memory.
    """

    pids: tuple[int, ...]
    sockets: frozenset[str]
    arenas: frozenset[int]

    @classmethod
    def of(cls, pids: tuple[int, ...]) -> Possessions:
        inodes = {target.removeprefix("socket:[")[:-1] for pid in pids for _, target in open_files(pid)}
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        sockets = frozenset(
            line[7] for line in lines if len(line) > 7 and line[6] in inodes and "ray_streamer" in line[7]
        )
        return cls(pids, sockets, frozenset(arena_inodes(pids)))

    def left(self) -> list[object]:
        """What is still there, in whatever process."""
        with_names = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        sockets = self.sockets & {line[7] for line in with_names if len(line) > 7}
        everybody = tuple(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return [*sockets, *self.arenas & arena_inodes(everybody), *(set(self.pids) & set(everybody))]


def open_files(pid: int) -> Iterator[tuple[str, str]]:
    """Path in /proc and target of each descriptor of a process."""
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                yield f"/proc/{pid}/fd/{fd}", os.readlink(f"/proc/{pid}/fd/{fd}")


def arena_inodes(pids: tuple[int, ...]) -> set[int]:
    """Inodes of the arenas that processes have open or mapped."""
    found: set[int] = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {int(line.split()[4]) for line in maps if ARENA in line}
            found |= {os.stat(path).st_ino for path, target in open_files(pid) if ARENA in target}
    return found


@dataclass(frozen=True)
class StalledLoad:
    """A load of two ranks in its middle: both have begun, one waits for the rest of a body.

    Attributes:
        model: Not waited for.
        proxy: Between the ranks and the server.
        held: What the ranks hold.
    """

    model: ShardedModel
    proxy: FaultProxy
    held: Possessions


class Bench:
    """Loads of one checkpoint from one server."""

    def __init__(self, server: Any, uri: str, folder: Path) -> None:
        self.server = server
        self.uri = uri
        self.folder = folder

    def load(self, endpoint_url: str, *, group: PlacementGroup | None = None, **arguments: Any) -> ShardedModel:
        return ray_streamer.load_sharded(
            self.uri,
            tp=2,
            settings=ray_streamer.Settings(
                s3_endpoint_url=endpoint_url, concurrency=2, memory_limit=1 << 20, retry_deadline_seconds=5
            ),
            placement=ray_streamer.PlacementOptions(
                placement_group=group, runtime_env={"env_vars": self.server.environment()}
            ),
            **arguments,
        )

    @contextmanager
    def stalled(self, **arguments: Any) -> Iterator[StalledLoad]:
        with FaultProxy(self.server.endpoint_url) as proxy:
            ray_streamer.plan(self.uri, settings=ray_streamer.Settings(s3_endpoint_url=proxy.url))
            proxy.fail_next(*[Fault()] * (len(proxy.ranges) + 3), Fault(body_bytes=1000, end="stall"))
            model = self.load(proxy.url, wait=False, **arguments)
            try:
                proxy.wait_until_stalled()
                # There is no public way to a rank's process before it has its tensors.
                held = Possessions.of(tuple(facts.pid for facts in model._group.facts))
                assert held.sockets
                assert len(held.arenas) == 2
                yield StalledLoad(model, proxy, held)
            finally:
                model.shutdown()

    def expect_a_good_load(self, group: PlacementGroup | None = None) -> None:
        with self.load(self.server.endpoint_url, group=group) as model:
            assert model.run(oracle.find_faults, str(self.folder)) == [[], []]


@pytest.fixture
def bench(checkpoint: Any, s3_credentials: Any) -> Bench:
    uri = s3_credentials.upload_folder(checkpoint.folder, f"failures-{next(_num_buckets)}", "model")
    return Bench(s3_credentials, uri, checkpoint.folder)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[PlacementGroup | None]:
    """Where the ranks sit."""
    if request.param == "own group":
        yield None
        return
    given = placement_group([{"CPU": 1}] * 2, strategy="PACK")
    ray.get(given.ready(), timeout=HANG_SECONDS)
    yield given
    remove_placement_group(given)


@pytest.mark.parametrize(
    ("group", "victim"),
    [pytest.param("own group", 0, marks=pytest.mark.slow), ("caller's group", 1)],
    indirect=["group"],
)
def test_a_rank_is_killed_in_the_middle_of_a_load(
    bench: Bench, group: PlacementGroup | None, victim: int, wait_until: Callable[..., None]
) -> None:
    with bench.stalled(group=group) as stalled:
        nodes = [facts.node for facts in stalled.model._group.facts]
        os.kill(stalled.held.pids[victim], signal.SIGKILL)
        with pytest.raises(RankFailedError, match="actor died") as caught:
            stalled.model.wait(HANG_SECONDS)
        assert (caught.value.rank, caught.value.node) == (victim, nodes[victim])
        assert f"rank {victim} on node {nodes[victim]} failed: actor died" in str(caught.value)
        wait_until(lambda: not stalled.held.left())
    with pytest.raises(RankFailedError, match="actor died"):
        stalled.model.run(print)
    states = {entry["placement_group_id"]: entry["state"] for entry in placement_group_table().values()}
    # Of the groups of earlier tests Ray may know nothing any more.
    standing = {name: state for name, state in states.items() if state != "REMOVED"}
    assert states
    assert standing == ({} if group is None else {group.id.hex(): "CREATED"})
    assert not [name for name in os.listdir("/dev/shm") if "ray_streamer" in name]
    assert not package_threads()
    bench.expect_a_good_load(group)


def test_an_object_is_replaced_in_the_middle_of_a_load(bench: Bench, wait_until: Callable[..., None]) -> None:
    with bench.stalled() as stalled:
        client = bench.server.client()
        bucket = bench.uri.split("/")[2]
        for path in bench.folder.glob("*.safetensors"):
            content = path.read_bytes()
            client.put_object(Bucket=bucket, Key=f"model/{path.name}", Body=content[:-1] + b"\x55")
        stalled.proxy.drop_connections()
        with pytest.raises(RankFailedError, match=r"model-0000\d-of-00003\.safetensors \[\d+, \d+\)") as caught:
            stalled.model.wait(HANG_SECONDS)
        assert type(caught.value.cause) is ObjectChangedError
        assert caught.value.rank in (0, 1)
        wait_until(lambda: not stalled.held.left())


def test_a_server_that_goes_away_in_the_middle_of_a_load(bench: Bench, wait_until: Callable[..., None]) -> None:
    with bench.stalled() as stalled:
        stalled.proxy.fail_next(*[Fault(status=503)] * 1000)
        stalled.proxy.drop_connections()
        with pytest.raises(RankFailedError, match=r"slow down.* retry_deadline_seconds is 5") as caught:
            stalled.model.wait(HANG_SECONDS)
        assert type(caught.value.cause).__name__ == "ThrottledError"
        wait_until(lambda: not stalled.held.left())


def test_a_shutdown_in_the_middle_of_a_load(bench: Bench, wait_until: Callable[..., None]) -> None:
    with bench.stalled() as stalled:
        stalled.model.shutdown()
        with pytest.raises(ClusterError, match="was shut down") as caught:
            stalled.model.wait(HANG_SECONDS)
        assert not isinstance(caught.value, RankFailedError)
        wait_until(lambda: not stalled.held.left())
        for use in (stalled.model.stats, lambda: stalled.model.plan, lambda: stalled.model.workers):
            with pytest.raises(ClusterError, match="was shut down"):
                use()


def test_after_an_interrupted_reload_the_handle_speaks_of_the_new_checkpoint(tmp_path: Path) -> None:
    """Ranks hold it or nothing, so a rank that is restarted must not get the old one."""
    layout = llama_layout(64, 1, 4, 2, 128, 100)
    old, new = (
        write_checkpoint(tmp_path / name, layout.tensors, seed=seed, config=layout.config)
        for seed, name in enumerate(("old", "new"))
    )
    settings = ray_streamer.Settings(page_cache="off")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with ray_streamer.load_sharded(str(old), tp=2, settings=settings) as model:
        model._loads._on_progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            model.reload(str(new))
        model._loads._on_progress = None
        assert model.plan.index.uri == str(new)
        for rank in range(2):
            model.restart(rank)
        assert torch.equal(
            model.gather("model.norm.weight"), load_file(next(new.glob("*.safetensors")))["model.norm.weight"]
        )


def test_an_interrupt_of_the_caller_ends_the_load(bench: Bench, assert_gone: Callable[..., None]) -> None:
    pids: list[int] = []

    def interrupt(_: object) -> None:
        pids.extend(entry["Pid"] for entry in ray._private.state.actors().values() if entry["State"] == "ALIVE")
        os.kill(os.getpid(), signal.SIGINT)

    with FaultProxy(bench.server.endpoint_url) as proxy:
        ray_streamer.plan(bench.uri, settings=ray_streamer.Settings(s3_endpoint_url=proxy.url))
        proxy.fail_next(*[Fault()] * (len(proxy.ranges) + 3), Fault(body_bytes=1000, end="stall"))
        with pytest.raises(KeyboardInterrupt):
            bench.load(proxy.url, on_progress=interrupt)
    assert len(pids) == 2
    assert_gone(pids)
