"""A node is lost: `restart` says so, waits for room elsewhere with a word, and takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import ray

from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.placement import PlacementOptions
from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def add_node(ray_of_two_nodes: Any, ray_cluster: str, wait_until: Callable[..., None]) -> Iterator[Callable[[], Any]]:
    """Adds a node with room for one rank that wants "far"; those that are there at the end are removed."""
    cluster = ray_of_two_nodes._cluster
    before = cluster.list_all_nodes()

    def add() -> Any:
        num_alive = count_alive()
        node = cluster.add_node(num_cpus=1, resources={"far": 1}, include_log_monitor=False)
        wait_until(lambda: count_alive() > num_alive)
        return node

    yield add
    for node in cluster.list_all_nodes():
        if node not in before:
            cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: count_alive() == len(before))


def count_alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def timeouts(startup_seconds: float) -> Timeouts:
    return Timeouts.of(Settings(startup_timeout_seconds=startup_seconds))


def test_a_rank_whose_node_is_lost_goes_to_another_one_as_soon_as_there_is_room(
    add_node: Callable[[], Any],
    ray_of_two_nodes: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Callable[..., None],
) -> None:
    node = add_node()
    placement = PlacementOptions(num_cpus_per_rank=0, resources={"far": 1})
    with WorkerGroup(int, 1, placement=placement, timeouts=timeouts(120)) as group:
        num_alive = count_alive()
        ray_of_two_nodes._cluster.remove_node(node, allow_graceful=False)
        # Ray does not know it yet, and learns it in the middle of this.
        with pytest.raises(ClusterError, match=r"rank 0 .* did not start: .*Its node was lost: call again"):
            group.restart(0)
        wait_until(lambda: count_alive() < num_alive)
        with monkeypatch.context() as patch:
            patch.setattr(group, "_timeouts", timeouts(3))
            with pytest.raises(
                StartupTimeoutError, match=r"no room for rank 0, whose node was lost, \(far 1 needed.*Add nodes"
            ):
                group.restart(0)
        assert "no room for rank 0, whose node was lost" in caplog.text
        add_node()
        group.restart(0)
        assert group.call("__pos__") == [0]


def test_a_rank_that_reserves_nothing_cannot_leave_its_lost_node(
    add_node: Callable[[], Any], ray_of_two_nodes: Any
) -> None:
    node = add_node()
    placement = PlacementOptions(num_cpus_per_rank=0, strategy="SPREAD")
    with WorkerGroup(int, 3, placement=placement, timeouts=timeouts(120)) as group:
        (lost,) = [rank for rank, facts in enumerate(group.facts) if facts.node_id == node.node_id]
        ray_of_two_nodes._cluster.remove_node(node, allow_graceful=False)
        with pytest.raises(ClusterError, match=rf"rank {lost} .* cannot go to another one: load again"):
            group.restart(lost)
