"""An owner that ends without a word: its ranks go, and what they had reserved is free again."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.placement import PlacementOptions
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    Check = Callable[..., None]

pytestmark = pytest.mark.usefixtures("idle_cluster")

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Holds nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def start_ranks(num_cpus_per_rank: float) -> WorkerGroup:
    placement = PlacementOptions(num_cpus_per_rank=num_cpus_per_rank, strategy="SPREAD")
    return WorkerGroup(
        Worker,
        2,
        placement=placement,
        holding="llama",
        timeouts=Timeouts.of(Settings(startup_timeout_seconds=60)),
    )


@ray.remote
class Owner:
    """An actor that holds a group of two ranks."""

    def __init__(self, num_cpus_per_rank: float = 1) -> None:
        self.group = start_ranks(num_cpus_per_rank)

    def pids(self) -> list[int]:
        return [os.getpid(), *(facts.pid for facts in self.group.facts)]

    def let_go(self) -> None:
        self.group.shutdown()

    def crash(self) -> None:
        os._exit(1)

    def raise_system_exit(self) -> None:
        sys.exit(1)


@ray.remote(max_retries=0)
def start_and_die(pid_file: str) -> None:
    group = start_ranks(1)
    Path(pid_file).write_text(" ".join(str(facts.pid) for facts in group.facts))
    os.kill(os.getpid(), signal.SIGKILL)


def num_groups() -> int:
    return sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())


def keepers() -> list[dict[str, Any]]:
    actors = ray._private.state.actors().values()
    return [actor for actor in actors if actor["ActorClassName"] == "Keeper" and actor["State"] != "DEAD"]


def num_keepers() -> int:
    return len(keepers())


ENDS: dict[str, Callable[[Any, list[int]], None]] = {
    "ray-kill": lambda owner, _: ray.kill(owner),
    "crash": lambda owner, _: owner.crash.remote(),
    "sigkill": lambda _, pids: os.kill(pids[0], signal.SIGKILL),
    "sys-exit": lambda owner, _: owner.raise_system_exit.remote(),
    "terminate": lambda owner, _: owner.__ray_terminate__.remote(),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_actor_that_ends_leaves_no_rank_no_group_and_no_keeper(
    end: str, wait_until: Check, assert_gone: Check
) -> None:
    owner = Owner.remote()
    pids = ray.get(owner.pids.remote())
    assert (num_groups(), num_keepers()) == (1, 1)
    ENDS[end](owner, pids)
    wait_until(lambda: (num_groups(), num_keepers()) == (0, 0))
    assert_gone(pids)


@pytest.mark.parametrize("seed", range(6))
def test_an_actor_killed_at_any_moment_of_its_start_leaves_nothing(seed: int, wait_until: Check) -> None:
    owner = Owner.remote()
    actors = ray._private.state.actors

    def pid_of_owner() -> int:
        return next((a["Pid"] for a in actors().values() if a["ActorID"] == owner._actor_id.hex()), 0)

    wait_until(pid_of_owner)
    # Most of these fall between the keeper, the group and the ranks.
    threading.Event().wait(random.Random(seed).uniform(0, 1.5))
    os.kill(pid_of_owner(), signal.SIGKILL)
    wait_until(lambda: num_groups() == 0 and all(a["State"] == "DEAD" for a in actors().values()))


def keepers_nodes() -> list[str]:
    return [keeper["Address"]["NodeID"] for keeper in keepers() if keeper["State"] == "ALIVE"]


@pytest.mark.parametrize("is_in_group", [False, True])
def test_a_keeper_stays_on_the_head_node_so_that_others_can_be_removed(wait_until: Check, *, is_in_group: bool) -> None:
    # Nodes that other tests added and removed are listed for good.
    alive = [node for node in ray.nodes() if node["Alive"]]
    other, head = (
        node["NodeID"] for node in sorted(alive, key=lambda node: "node:__internal_head__" in node["Resources"])
    )
    strategy: Any = NodeAffinitySchedulingStrategy(other, soft=False)
    if is_in_group:  # as a replica of Serve, whose actors get into its group unless they say otherwise
        group = placement_group([{"CPU": 1}], _soft_target_node_id=other, strategy="STRICT_PACK")
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    owner = Owner.options(scheduling_strategy=strategy).remote()
    try:
        ray.get(owner.pids.remote())
        wait_until(keepers_nodes)
        assert keepers_nodes() == [head]
    finally:
        ray.kill(owner)
        if is_in_group:
            remove_placement_group(group)
    wait_until(lambda: (num_groups(), num_keepers()) == (0, 0))


def test_an_actor_whose_handle_goes_out_of_scope_leaves_nothing(wait_until: Check, assert_gone: Check) -> None:
    owner = Owner.remote()
    pids = ray.get(owner.pids.remote())
    del owner
    wait_until(lambda: (num_groups(), num_keepers()) == (0, 0))
    assert_gone(pids)


def test_a_task_that_is_killed_leaves_nothing(tmp_path: Path, wait_until: Check, assert_gone: Check) -> None:
    pid_file = tmp_path / "pids"
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(start_and_die.remote(str(pid_file)))
    wait_until(lambda: (num_groups(), num_keepers()) == (0, 0))
    assert_gone(map(int, pid_file.read_text().split()))


def test_a_rank_that_dies_takes_no_reservation_along(wait_until: Check) -> None:
    owner = Owner.remote()
    pids = ray.get(owner.pids.remote())
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: sum(a["State"] == "DEAD" and a["Pid"] in pids for a in ray._private.state.actors().values()) == 2
    )
    assert (num_groups(), num_keepers()) == (1, 1)
    ray.get(owner.let_go.remote())
    wait_until(lambda: (num_groups(), num_keepers()) == (0, 0))
    ray.kill(owner)


def test_a_driver_and_a_group_that_reserves_nothing_need_no_keeper() -> None:
    with start_ranks(1):
        assert (num_groups(), num_keepers()) == (1, 0)
    owner = Owner.remote(0)
    assert len(ray.get(owner.pids.remote())) == 3
    assert num_keepers() == 0
    ray.kill(owner)
