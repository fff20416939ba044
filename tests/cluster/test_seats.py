"""Where the ranks of a group are put: given, current and own placement groups, on a real cluster."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.placement import PlacementOptions
from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray.util.placement_group import PlacementGroup

    MakeGroup = Callable[..., PlacementGroup]

pytestmark = pytest.mark.usefixtures("idle_cluster")

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Tells which placement group it is in."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def seat(self) -> str | None:
        from ray.util.placement_group import get_current_placement_group

        current = get_current_placement_group()
        return None if current is None else current.id.hex()


@ray.remote
class Caller:
    """An actor that starts a group of its own."""

    def is_here(self) -> bool:
        return True

    def start(self, num_ranks: int, options: PlacementOptions) -> tuple[list[str | None], tuple[Any, ...]]:
        with WorkerGroup(
            Worker,
            num_ranks,
            placement=options,
            timeouts=Timeouts.of(Settings(startup_timeout_seconds=60)),
        ) as group:
            return group.call("seat"), group.nodes


@pytest.fixture
def make_group() -> Iterator[MakeGroup]:
    """Placement groups of the caller, removed after the test."""
    made: list[PlacementGroup] = []

    def make(bundles: list[dict[str, float]], strategy: str = "PACK", *, is_ready: bool = True) -> PlacementGroup:
        made.append(placement_group(bundles, strategy=strategy))
        assert not is_ready or made[-1].wait(120)
        return made[-1]

    yield make
    for group in made:
        remove_placement_group(group)


def start(num_ranks: int, *, timeout: float = 300, holding: str = "workers", **options: Any) -> WorkerGroup:
    placement = PlacementOptions(**options)
    return WorkerGroup(
        Worker,
        num_ranks,
        placement=placement,
        holding=holding,
        timeouts=Timeouts.of(Settings(startup_timeout_seconds=timeout)),
    )


def test_the_callers_group_is_used_and_left_standing(make_group: MakeGroup, assert_gone: Callable[..., None]) -> None:
    given = make_group([{"CPU": 1}] * 3, "SPREAD")
    with start(3, placement_group=given) as group:
        handles = group.actors
        assert group.call("seat") == [given.id.hex()] * 3
        assert sorted(map(len, group.nodes)) == [1, 2]
    assert_gone(facts.pid for facts in group.facts)
    assert len(handles) == 3
    assert placement_group_table(given)["state"] == "CREATED"


def test_one_large_bundle_seats_several_ranks(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 2}])
    with start(4, placement_group=given, num_cpus_per_rank=0.5) as group:
        assert group.nodes == ((0, 1, 2, 3),)


def test_ranks_that_reserve_nothing_share_a_given_group(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 1}] * 2, "STRICT_SPREAD")
    with start(4, placement_group=given, num_cpus_per_rank=0) as group:
        assert group.nodes == ((0, 1), (2, 3))


def test_a_group_that_fits_one_node_of_the_callers_group_stays_on_it(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 1}, {"CPU": 2}], "STRICT_SPREAD")
    with start(2, placement_group=given) as group:
        assert group.nodes == ((0, 1),)


def test_bundles_that_others_hold_are_left_out(make_group: MakeGroup, wait_until: Callable[..., None]) -> None:
    given = make_group([{"CPU": 1}] * 3, "SPREAD")
    neighbour = Caller.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(given, 0)).remote()
    assert ray.get(neighbour.is_here.remote())
    wait_until(lambda: ray.available_resources().get(f"CPU_group_{given.id.hex()}") == 2)
    with start(2, placement_group=given) as group:
        assert len(group.call("seat")) == 2
    ray.kill(neighbour)


def test_loads_that_start_side_by_side_do_not_choose_the_same_bundles(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 1}] * 4)
    # Twice: what the first two held is free again.
    for _ in range(2):
        with ThreadPoolExecutor(2) as threads:
            starts = [threads.submit(start, 2, placement_group=given) for _ in range(2)]
            groups = [started.result() for started in starts]
        for group in groups:
            assert group.call("seat") == [given.id.hex()] * 2
            group.shutdown()


def test_bundle_indices_give_the_rank_order(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 1}] * 2, "STRICT_SPREAD")
    nodes = placement_group_table(given)["bundles_to_node_id"]
    for indices in ([1, 0], [0, 1]):
        with start(2, placement_group=given, bundle_indices=indices) as group:
            assert [facts.node_id for facts in group.facts] == [nodes[index] for index in indices]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, r"room for 2 of 3 ranks .*\['CPU 1', 'CPU 1'\]", id="too-small"),
        pytest.param({"bundle_indices": [0, 1]}, "names 2 bundles for 3 ranks", id="too-few-indices"),
        pytest.param({"bundle_indices": [0, 1, 1]}, "bundle 1 of 2 has room for 1 rank, not 2", id="index-twice"),
        pytest.param({"bundle_indices": [0, 1, 2]}, "bundle 2 of 2 has room for 0", id="index-out-of-range"),
    ],
)
def test_a_given_group_without_room_is_refused(make_group: MakeGroup, options: dict[str, Any], message: str) -> None:
    given = make_group([{"CPU": 1}] * 2)
    with pytest.raises(ClusterError, match=message):
        start(3, placement_group=given, **options)


def test_a_given_group_that_was_removed_is_refused(make_group: MakeGroup) -> None:
    given = make_group([{"CPU": 1}])
    remove_placement_group(given)
    with pytest.raises(ClusterError, match="was removed"):
        start(1, placement_group=given)


def test_inside_an_actor_its_group_is_used_when_it_has_room(make_group: MakeGroup) -> None:
    current = make_group([{"CPU": 1}] * 4)
    caller = Caller.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(current, 0)).remote()
    seats, nodes = ray.get(caller.start.remote(3, PlacementOptions()))
    assert seats == [current.id.hex()] * 3
    assert sum(map(len, nodes)) == 3
    assert placement_group_table(current)["state"] == "CREATED"
    ray.kill(caller)


def test_inside_an_actor_whose_group_is_full_an_own_one_is_made(make_group: MakeGroup) -> None:
    current = make_group([{"CPU": 1}] * 2)
    caller = Caller.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(current, 0)).remote()
    seats, _ = ray.get(caller.start.remote(2, PlacementOptions()))
    assert len(set(seats)) == 1
    assert seats[0] not in (None, current.id.hex())
    ray.kill(caller)


@pytest.mark.parametrize(
    ("num_ranks", "options", "message"),
    [
        pytest.param(
            5, {}, "5 ranks with CPU 1 each, placed PACK, .* hold 4 .*127.0.0.3 has CPU 2: 2 ranks", id="pack"
        ),
        pytest.param(3, {"strategy": "STRICT_PACK"}, "placed STRICT_PACK, .* hold 2", id="strict-pack"),
        pytest.param(3, {"strategy": "STRICT_SPREAD", "num_cpus_per_rank": 0.1}, "hold 2", id="strict-spread"),
        pytest.param(3, {"strategy": "STRICT_SPREAD", "num_cpus_per_rank": 0}, "hold 2", id="strict-spread-no-cpus"),
        pytest.param(1, {"num_gpus_per_rank": 1}, "GPU 1 each, .* has CPU 2, GPU 0: 0 ranks", id="no-gpus"),
        pytest.param(3, {"label_selector": {"zone": "far"}}, "only node holds 2", id="few-nodes-with-label"),
        pytest.param(1, {"label_selector": {"zone": "moon"}}, "none matches label_selector", id="no-node-with-label"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(num_ranks: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        start(num_ranks, **options)
    assert "wait_for_nodes=True" in str(caught.value)
    assert not isinstance(caught.value, StartupTimeoutError)


def test_ranks_that_reserve_nothing_sit_on_the_drivers_node() -> None:
    with start(3, num_cpus_per_rank=0) as group:
        assert {facts.node_id for facts in group.facts} == {ray.get_runtime_context().get_node_id()}


def test_a_label_that_ray_refuses_is_a_cluster_error() -> None:
    with pytest.raises(ClusterError, match="Ray refuses"):
        start(1, label_selector={"zone": "in(far"}, wait_for_nodes=True)


def test_labels_choose_the_node() -> None:
    with start(2, label_selector={"zone": "in(far, near)"}) as group:
        assert {facts.node_ip for facts in group.facts} == {"127.0.0.3"}
    with start(2, label_selector={"zone": "!far"}, num_cpus_per_rank=0) as group:
        assert {facts.node_ip for facts in group.facts} == {"127.0.0.2"}


def test_taken_room_is_told_with_who_holds_it_while_it_is_waited_for(
    make_group: MakeGroup, caplog: pytest.LogCaptureFixture
) -> None:
    taken = make_group([{"CPU": 1}] * 3)
    caller = Caller.options(num_cpus=1, name="engine").remote()
    assert ray.get(caller.is_here.remote())
    with pytest.raises(StartupTimeoutError) as caught:
        start(2, timeout=3, holding="llama")
    said = str(caught.value)
    ray.kill(caller)
    holders = f"placement group {taken.id.hex()} holds CPU 3; actor engine (pid "
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told
    for sentence in (told[0], said):
        assert "no room for the 2 ranks (CPU 2 needed, 0 of 4 free)" in sentence
        assert holders in sentence
        assert "End what holds the rest" in sentence
        assert 'strategy="PACK"' in sentence
    assert "startup_timeout_seconds=3" in said
    states = {entry["state"] for key, entry in placement_group_table().items() if key != taken.id.hex()}
    assert states == {"REMOVED"}


def test_a_model_of_this_process_that_holds_the_room_is_told_as_ours() -> None:
    with start(4, strategy="PACK", holding="llama"), pytest.raises(StartupTimeoutError) as caught:
        start(1, timeout=1, strategy="PACK", holding="draft")
    assert "model draft (1 rank): no room for the only rank" in str(caught.value)
    assert "model llama (4 ranks), loaded by this process, holds CPU 4. Call shutdown()" in str(caught.value)
    assert "strategy=" not in str(caught.value)
    with start(4) as group:
        assert group.num_ranks == 4


def test_a_room_that_becomes_free_is_taken(make_group: MakeGroup, caplog: pytest.LogCaptureFixture) -> None:
    taken = make_group([{"CPU": 1}] * 4)

    class FreesWhenTold(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remove_placement_group(taken)

    handler = FreesWhenTold(logging.WARNING)
    logging.getLogger("ray_streamer.cluster.waiting").addHandler(handler)
    try:
        with start(2) as group:
            assert group.num_ranks == 2
    finally:
        logging.getLogger("ray_streamer.cluster.waiting").removeHandler(handler)
    assert "no room for the 2 ranks" in caplog.text


def test_what_the_calling_actor_itself_holds_is_refused_at_once() -> None:
    caller = Caller.options(num_cpus=1).remote()
    with pytest.raises(ClusterError, match=r"of which the calling actor holds CPU 1.*num_cpus=0 for the calling actor"):
        ray.get(caller.start.remote(4, PlacementOptions()))
    ray.kill(caller)


def test_wait_for_nodes_waits_for_what_is_not_there_yet() -> None:
    with pytest.raises(StartupTimeoutError, match=r"GPU 1 needed, 0 of 0 free.*Add nodes"):
        start(1, timeout=1, num_gpus_per_rank=1, wait_for_nodes=True)


def test_a_start_that_is_called_off_while_it_waits_for_room_leaves_nothing(make_group: MakeGroup) -> None:
    taken = make_group([{"CPU": 1}] * 4)
    is_off = threading.Event()
    seen: list[str] = []

    class CallsOffWhenTold(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            is_off.set()

    handler = CallsOffWhenTold(logging.WARNING)
    logging.getLogger("ray_streamer.cluster.waiting").addHandler(handler)
    try:
        with pytest.raises(ClusterError, match="called off") as caught:
            WorkerGroup(
                Worker,
                2,
                is_called_off=is_off.is_set,
                timeouts=Timeouts.of(Settings(startup_timeout_seconds=60)),
            )
    finally:
        logging.getLogger("ray_streamer.cluster.waiting").removeHandler(handler)
    assert len(seen) == 1
    assert not isinstance(caught.value, StartupTimeoutError)
    states = {entry["state"] for key, entry in placement_group_table().items() if key != taken.id.hex()}
    assert states == {"REMOVED"}
