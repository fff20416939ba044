"""Groups of real actors: order, calls, failures, teardown."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from ray_streamer.cluster.calls import send
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.placement import PlacementOptions
from ray_streamer.errors import (
    ClusterError,
    LoadAbortedError,
    ObjectMissingError,
    RankFailedError,
    StartupTimeoutError,
)
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.messages import Pulse
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Check = Callable[..., None]

pytestmark = pytest.mark.usefixtures("idle_cluster")

# The actors cannot import a test module; they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Answers, blocks, fails or dies on request."""

    def __init__(self, rank: int, greeting: str = "") -> None:
        self.rank = rank
        self.greeting = greeting
        self.doing = "nothing"
        self.reason: str | None = None
        self.aborted = threading.Event()
        self.noted: list[str] = []

    def note(self, name: str) -> None:
        self.noted.append(name)

    def notes(self) -> list[str]:
        return self.noted

    def greet(self, *names: str) -> tuple[int, str, tuple[str, ...]]:
        return self.rank, self.greeting, names

    def pid(self) -> int:
        return os.getpid()

    def reason_of_abort(self) -> str | None:
        return self.reason

    def block(self) -> None:
        self.doing = "blocked"
        self.aborted.wait(60)
        raise LoadAbortedError(self.reason)

    def ignore_abort(self) -> None:
        self.doing = "blocked"
        threading.Event().wait(60)

    def fail_or_block(self, failing: int, error: Exception) -> None:
        if self.rank == failing:
            raise error
        self.block()

    def blame_or_fail_late(self, guilty: int, error: Exception) -> None:
        if self.rank != guilty:
            raise RankFailedError(guilty, "somewhere", "its socket closed")
        self.aborted.wait(60)
        raise error

    def blame(self, guilty: int) -> None:
        raise RankFailedError(guilty, "somewhere", "its socket closed")

    def wait_in_vain(self, absent: int) -> None:
        if self.rank == absent:
            self.ignore_abort()
        raise StartupTimeoutError(f"ranks [{absent}] did not connect to rank {self.rank}", [absent])

    def stop_or_answer(self, stopped: int) -> None:
        if self.rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
            # Another thread may take the signal, and this one goes on for a moment.
            time.sleep(60)

    def hold_the_lock(self, seconds: int) -> int:
        # Of Python: no other thread of the process gets a turn.
        return ctypes.PyDLL(None).sleep(seconds)

    def report_ranks_of_its_own(self) -> None:
        if self.rank == 0:
            raise StartupTimeoutError("ranks of a load inside of the function", [1])

    def fail_or_ignore_abort(self, failing: int) -> None:
        if self.rank == failing:
            raise ValueError("mine")
        self.ignore_abort()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def abort(self, reason: str) -> None:
        self.reason = reason
        self.aborted.set()

    def progress(self) -> str:
        return self.doing


class BadProgress(Worker):
    """A worker with a bug."""

    def progress(self) -> str:
        raise ZeroDivisionError("bug")


class Pulsing(Worker):
    """Says what it does, as a rank that loads."""

    def __init__(self, rank: int, pulse: Pulse, grows: bool) -> None:
        super().__init__(rank)
        self._pulse, self._grows = pulse, grows

    def pulse(self) -> Pulse:
        if self._grows:
            self._pulse = self._pulse._replace(num_steps=self._pulse.num_steps + 1)
        return self._pulse

    def sleep(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.rank


class SlowConstructor(Worker):
    """Rank 1 never starts."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        if rank == 1:
            threading.Event().wait(60)


class FailingConstructor(Worker):
    """Rank 1 raises."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        if rank == 1:
            raise ObjectMissingError("no such checkpoint")


class DyingConstructor(Worker):
    """Rank 1 takes its process along."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def start(
    num_ranks: int,
    worker_class: type[Any] = Worker,
    *,
    timeout: float = 60,
    patience: float = 8,
    step: float = 300,
    args: tuple[Any, ...] = (),
    holding: str = "workers",
    **options: Any,
) -> WorkerGroup:
    return WorkerGroup(
        worker_class,
        num_ranks,
        args=args,
        holding=holding,
        placement=PlacementOptions(**options),
        timeouts=Timeouts(startup_seconds=timeout, neighbour_seconds=patience, progress_seconds=step),
    )


def placement_group_states() -> set[str]:
    return {entry["state"] for entry in placement_group_table().values()}


def pids_of(group: WorkerGroup) -> list[int]:
    return [facts.pid for facts in group.facts]


def when_all_blocked(group: WorkerGroup, act: Callable[[], None]) -> Callable[[list[Any]], None]:
    """A progress callback that acts once, when every rank is inside its blocking call."""
    acted = False

    def on_progress(doing: list[Any]) -> None:
        nonlocal acted
        if not acted and doing == ["blocked"] * group.num_ranks:
            acted = True
            act()

    return on_progress


def test_ranks_are_contiguous_per_node_and_the_drivers_node_is_first() -> None:
    with start(4, strategy="SPREAD") as group:
        assert group.nodes == ((0, 1), (2, 3))
        assert [facts.node_ip for facts in group.facts] == ["127.0.0.2"] * 2 + ["127.0.0.3"] * 2
        assert group.facts[0].node_id == ray.get_runtime_context().get_node_id()
        assert group.call("pid") == pids_of(group)
        assert all(facts.available_memory_bytes > 0 for facts in group.facts)


def test_actors_and_placement_group_are_named_by_what_they_hold_and_by_rank() -> None:
    with start(2, holding="llama") as first, start(2, holding="llama", strategy="PACK") as second:
        for group in (first, second):
            for rank, actor in enumerate(group.actors):
                ((_, name),) = [
                    (entry["ActorID"], entry["Name"])
                    for entry in ray._private.state.actors().values()
                    if entry["ActorID"] == actor._actor_id.hex()
                ]
                assert name.startswith(f"llama rank {rank} of 2 ")
                assert ray.get_actor(name) == actor
        names = {entry["name"] for entry in placement_group_table().values() if entry["state"] == "CREATED"}
        assert len(names) == 2
        assert all(name.startswith("ray_streamer llama x2 ") for name in names)
        second.restart(1)
        assert second.call("greet") == [(0, "", ()), (1, "", ())]


def test_workers_are_built_with_rank_and_arguments() -> None:
    with start(2, args=("hello",)) as group:
        assert group.call("greet") == [(0, "hello", ()), (1, "hello", ())]


def test_calls_reach_the_named_ranks_with_their_own_arguments() -> None:
    with start(2) as group:
        shared = ray.put("shared")
        assert group.call("greet", shared, ranks=[1, 0], per_rank_args=[["for 1"], ["for 0"]]) == [
            (1, "", ("shared", "for 1")),
            (0, "", ("shared", "for 0")),
        ]


@pytest.mark.parametrize(
    ("num_ranks", "options", "num_nodes"),
    [
        pytest.param(2, {}, 1, id="one-node-when-it-can-hold-the-group"),
        pytest.param(4, {}, 2, id="several-nodes-when-none-can"),
        pytest.param(2, {"strategy": "SPREAD"}, 2, id="spread-when-asked"),
        pytest.param(4, {"num_cpus_per_rank": 0.5}, 1, id="fractional-cpus"),
        pytest.param(5, {"num_cpus_per_rank": 0}, 1, id="no-cpus-more-ranks-than-there-are"),
        pytest.param(3, {"num_cpus_per_rank": 0, "strategy": "SPREAD"}, 2, id="no-cpus-spread"),
    ],
)
def test_placement(num_ranks: int, options: dict[str, Any], num_nodes: int) -> None:
    with start(num_ranks, **options) as group:
        assert len(group.nodes) == num_nodes
        assert [rank for ranks in group.nodes for rank in ranks] == list(range(num_ranks))


def test_control_answers_while_a_call_blocks() -> None:
    with start(2) as group:
        seen: list[list[str]] = []

        def answer() -> None:
            seen.append(group.control("progress", timeout_seconds=60))
            group.control("abort", "enough", timeout_seconds=60)

        with pytest.raises(RankFailedError) as caught:
            group.call("block", on_progress=when_all_blocked(group, answer))
        assert seen == [["blocked", "blocked"]]
        assert isinstance(caught.value.cause, LoadAbortedError)


def test_a_killed_actor_is_named_and_everything_is_torn_down(assert_gone: Check, wait_until: Check) -> None:
    with start(3, num_cpus_per_rank=0.5, strategy="SPREAD") as group:
        nodes = [facts.node for facts in group.facts]
        pids = pids_of(group)

        def kill() -> None:
            os.kill(pids[2], signal.SIGKILL)

        with pytest.raises(RankFailedError, match=r"rank 2 on node .* failed: actor died") as caught:
            group.call("block", on_progress=when_all_blocked(group, kill))
        assert (caught.value.rank, caught.value.node) == (2, nodes[2])
        assert_gone(pids)
        wait_until(lambda: placement_group_states() == {"REMOVED"})
    with start(4) as group:
        assert len(group.call("greet")) == 4


def test_a_workers_own_error_keeps_its_type_and_its_traceback(assert_gone: Check) -> None:
    group = start(2)
    pids = pids_of(group)
    with pytest.raises(RankFailedError) as caught:
        group.call("fail_or_block", 1, ObjectMissingError("no model.safetensors"))
    assert type(caught.value.cause) is ObjectMissingError
    assert caught.value.__cause__ is caught.value.cause
    assert caught.value.rank == 1
    assert "fail_or_block" in caught.value.cause.__notes__[0]
    assert_gone(pids)
    with pytest.raises(ClusterError, match=r"was shut down"):
        group.call("greet")
    group.shutdown()


def test_a_failed_rank_aborts_the_others_and_tells_them_why() -> None:
    with start(3, num_cpus_per_rank=0.5) as group:
        with pytest.raises(RankFailedError, match=r"rank 0 .* ValueError: mine"):
            group.call("fail_or_block", 0, ValueError("mine"), keep_on_failure=True)
        reasons = group.call("reason_of_abort")
        assert reasons[0] is None
        assert all("rank 0" in reason and "mine" in reason for reason in reasons[1:])


def test_the_real_cause_wins_over_a_neighbours_report_that_came_first() -> None:
    with start(2) as group, pytest.raises(RankFailedError) as caught:
        group.call("blame_or_fail_late", 1, ObjectMissingError("no such file"))
    assert caught.value.rank == 1
    assert type(caught.value.cause) is ObjectMissingError


def test_a_neighbours_report_is_told_when_nothing_better_comes() -> None:
    with start(2) as group, pytest.raises(RankFailedError) as caught:
        group.call("blame", 1, ranks=[0])
    assert (caught.value.rank, caught.value.cause) == (1, "its socket closed")


def test_of_ranks_that_waited_for_another_the_one_that_did_not_come_is_the_failed_one(assert_gone: Check) -> None:
    group = start(3)
    pids = pids_of(group)
    with pytest.raises(RankFailedError) as caught:
        group.call("wait_in_vain", 1)
    assert caught.value.rank == 1
    assert isinstance(caught.value.cause, StartupTimeoutError)
    assert_gone(pids)


def test_a_rank_that_is_stopped_while_only_the_driver_waits_for_it_is_named(assert_gone: Check) -> None:
    group = start(2, patience=1.0)
    pids = pids_of(group)
    with pytest.raises(
        RankFailedError, match=r"stopped by a signal, longer than neighbour_timeout_seconds=1;"
    ) as caught:
        group.call("stop_or_answer", 1)
    assert caught.value.rank == 1
    assert_gone(pids)


def test_a_rank_that_is_silent_without_being_stopped_has_as_long_as_one_step(assert_gone: Check) -> None:
    group = start(1, patience=0.5, step=2.0)
    pids = pids_of(group)
    with pytest.raises(RankFailedError, match=r"answered nothing for progress_timeout_seconds=2;"):
        group.call("hold_the_lock", 60)
    assert_gone(pids)


def test_the_callers_own_function_may_be_silent_for_as_long_as_it_likes() -> None:
    with start(1, patience=0.5, step=1.0) as group:
        assert group.call("hold_the_lock", 4, is_callers=True) == [0]


STUCK = Pulse(7, True, "reading and copying tensors")


def test_a_rank_that_answers_and_makes_no_step_is_named(assert_gone: Check) -> None:
    """As one that is alone on its node, and reads a mount whose server is gone."""
    group = start(1, Pulsing, args=(STUCK, False), patience=0.5, step=2.0)
    pids = pids_of(group)
    with pytest.raises(
        RankFailedError, match=r"no progress for progress_timeout_seconds=2 while reading and copying tensors;"
    ):
        group.call("sleep", 60)
    assert_gone(pids)


@pytest.mark.parametrize(
    ("pulse", "grows", "is_callers"),
    [
        pytest.param(STUCK, True, False, id="makes steps"),
        pytest.param(STUCK._replace(is_busy=False), False, False, id="waits for others"),
        pytest.param(STUCK, False, True, id="the caller's own function"),
    ],
)
def test_a_rank_that_makes_steps_or_waits_is_not_given_up(pulse: Pulse, *, grows: bool, is_callers: bool) -> None:
    # Longer than an answer takes on a busy machine, and shorter than the call.
    with start(1, Pulsing, args=(pulse, grows), patience=0.5, step=2.0) as group:
        assert group.call("sleep", 5, is_callers=is_callers) == [0]


def test_what_the_callers_own_function_says_of_ranks_is_not_about_these() -> None:
    with start(2) as group, pytest.raises(RankFailedError) as caught:
        group.call("report_ranks_of_its_own", is_callers=True)
    assert caught.value.rank == 0


def test_ranks_that_ignore_the_abort_are_torn_down_too(assert_gone: Check) -> None:
    group = start(2)
    pids = pids_of(group)
    with pytest.raises(RankFailedError, match=r"rank 1 .* ValueError: mine"):
        group.call("fail_or_ignore_abort", 1)
    assert_gone(pids)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Untransportable(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("stays here")

    class Odd(Worker):
        def greet(self, *_: str) -> Any:
            raise Untransportable("odd")

    with start(1, Odd) as group, pytest.raises(RankFailedError, match=r"Untransportable") as caught:
        group.call("greet")
    assert type(caught.value.cause) is ClusterError


def test_a_bug_in_progress_is_not_hidden(assert_gone: Check) -> None:
    group = start(1, BadProgress)
    pids = pids_of(group)
    with pytest.raises(ClusterError, match=r"ZeroDivisionError"):
        group.call("block", on_progress=lambda _: None)
    assert_gone(pids)


def test_an_interrupt_of_the_driver_tears_down(assert_gone: Check) -> None:
    group = start(2)
    pids = pids_of(group)
    with pytest.raises(KeyboardInterrupt):
        group.call("block", on_progress=when_all_blocked(group, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert_gone(pids)


@pytest.mark.parametrize("is_sent", [True, False])
def test_an_interrupt_between_two_sends_aborts_the_ranks_that_were_called(
    monkeypatch: pytest.MonkeyPatch, wait_until: Check, *, is_sent: bool
) -> None:
    """Before the second rank has its call, or after it has, and before the driver knows."""
    num_sent = 0

    def interrupted_send(*args: Any) -> Any:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 2 and not is_sent:
            raise KeyboardInterrupt
        ref = send(*args)
        if num_sent == 2:
            raise KeyboardInterrupt
        return ref

    with start(2) as group:
        with monkeypatch.context() as patch:
            patch.setattr("ray_streamer.cluster.group.send", interrupted_send)
            with pytest.raises(KeyboardInterrupt):
                group.call("block", keep_on_failure=True)
        # Without the abort, it would block before it answers this.
        wait_until(lambda: group.call("reason_of_abort") == ["KeyboardInterrupt: "] * 2)


def test_a_forgotten_group_is_torn_down(assert_gone: Check, wait_until: Check) -> None:
    group = start(2)
    pids = pids_of(group)
    del group
    gc.collect()
    assert_gone(pids)
    wait_until(lambda: placement_group_states() == {"REMOVED"})


def test_a_rank_that_does_not_start_is_named_and_the_half_started_group_goes(wait_until: Check) -> None:
    with pytest.raises(
        StartupTimeoutError, match=r"[12] of 2 ranks.* startup_timeout_seconds=4: rank \d in bundle \d of"
    ) as caught:
        start(2, SlowConstructor, timeout=4)
    assert "raise startup_timeout_seconds" in str(caught.value)
    wait_until(lambda: placement_group_states() == {"REMOVED"})
    wait_until(lambda: ray.available_resources().get("CPU") == 4)


@pytest.mark.parametrize(
    ("worker_class", "message"),
    [
        pytest.param(FailingConstructor, "ObjectMissingError: no such checkpoint", id="raises"),
        pytest.param(DyingConstructor, "actor died", id="dies"),
    ],
)
def test_a_constructor_that_fails_names_its_rank(worker_class: type[Any], message: str) -> None:
    # Whether its node is known by then is chance: a process that is killed may take its first answer along.
    with pytest.raises(ClusterError, match=f"rank 1 (on node|in bundle) .* {message}"):
        start(2, worker_class)


def test_a_runtime_environment_that_cannot_be_made_is_a_cluster_error() -> None:
    with pytest.raises(ClusterError, match=r"Ray refuses .* /no/such/folder is not a valid path"):
        start(1, runtime_env={"working_dir": "/no/such/folder"})


def test_a_dead_rank_is_restarted_in_its_seat_and_the_others_keep_running() -> None:
    with start(4) as group:
        before = group.facts
        with pytest.raises(RankFailedError, match=r"rank 3 .* actor died"):
            group.call("die", ranks=[3], keep_on_failure=True)
        group.restart(3)
        assert group.call("greet") == [(rank, "", ()) for rank in range(4)]
        assert pids_of(group)[:3] == [facts.pid for facts in before[:3]]
        assert pids_of(group)[3] != before[3].pid
        assert [facts.node_id for facts in group.facts] == [facts.node_id for facts in before]


def test_a_live_rank_may_be_restarted(assert_gone: Check) -> None:
    with start(2) as group:
        old, handles = pids_of(group), group.actors
        group.restart(0)
        assert group.actors[0] != handles[0]
        assert_gone(old[:1])
        assert group.call("greet", ranks=[0]) == [(0, "", ())]


def test_what_the_start_depends_on_is_asked_for_within_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(2) as group:
        assert group.ask("pid", rank=1) == group.facts[1].pid
        with pytest.raises(RankFailedError, match=r"rank 0 .*AttributeError"):
            group.ask("no_such_method")
        # Short only now: on a busy machine an actor takes long to start.
        monkeypatch.setattr(group, "_timeouts", Timeouts.of(Settings(startup_timeout_seconds=0.5)))
        with pytest.raises(StartupTimeoutError, match=r"1 of 2 ranks did not ignore_abort within .*=0\.5: rank 0 in "):
            group.ask("ignore_abort")


def test_what_waits_for_a_function_of_the_callers_is_told_which_rank_runs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait_until: Check
) -> None:
    monkeypatch.setattr("ray_streamer.cluster.functions.SLOW_START_SECONDS", 0.0)
    with start(2) as group, ThreadPoolExecutor(2) as pool:
        running = pool.submit(group.call, "block", ranks=[0], is_callers=True, keep_on_failure=True)
        wait_until(lambda: group.control("progress", timeout_seconds=60) == ["blocked", "nothing"])
        waiting = pool.submit(group.call, "greet")
        wait_until(lambda: "a call (greet) has waited for" in caplog.text)
        assert "Rank 0 runs the caller's function (model.run), and other calls wait for its end" in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr(group, "_timeouts", Timeouts.of(Settings(startup_timeout_seconds=0.5)))
            with pytest.raises(StartupTimeoutError, match=r"did not pid within .*Rank 0 runs the caller's") as caught:
                group.ask("pid")
        assert "raise startup_timeout_seconds" not in str(caught.value)
        group.control("abort", "enough", timeout_seconds=60)
        assert isinstance(running.exception(60), RankFailedError)
        assert waiting.result(60) == [(0, "", ()), (1, "", ())]


def test_calls_of_several_threads_run_in_one_order_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    first_is_half_sent, second_is_sent = threading.Event(), threading.Event()

    def send_slowly(method: Any, name: str, *args: Any) -> Any:
        ref = send(method, name, *args)
        if args == ("first",) and not first_is_half_sent.is_set():
            first_is_half_sent.set()
            # As long as the second one waits for its turn, this is in vain.
            second_is_sent.wait(1)
        return ref

    with start(2) as group, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("ray_streamer.cluster.group.send", send_slowly)
        first = pool.submit(group.call, "note", "first")
        assert first_is_half_sent.wait(60)
        group.call("note", "second")
        second_is_sent.set()
        first.result(60)
        assert group.call("notes") == [["first", "second"]] * 2


def test_a_function_that_was_interrupted_is_still_known_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(1) as group:
        interrupt = when_all_blocked(group, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            group.call("ignore_abort", on_progress=interrupt, is_callers=True, keep_on_failure=True)
        monkeypatch.setattr(group, "_timeouts", Timeouts.of(Settings(startup_timeout_seconds=0.5)))
        with pytest.raises(StartupTimeoutError, match=r"Rank 0 runs the caller's function"):
            group.ask("pid")


@pytest.mark.slow  # a fork beside gRPC's threads is what Ray itself does not promise to survive
def test_a_forked_process_ends_nothing_and_calls_nothing() -> None:
    with WorkerGroup(Worker, 1, timeouts=Timeouts.of(Settings(startup_timeout_seconds=60))) as group:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of threads, which is what this is about.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            with pytest.raises(ClusterError, match="forked from it"):
                group.call("pid")
            group.shutdown()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert group.call("greet") == [(0, "", ())]


def test_a_module_that_ranks_lack_is_named_with_the_way_to_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "on_the_driver_only.py").write_text("class Value: pass")
    with start(1) as group:
        monkeypatch.syspath_prepend(tmp_path)
        value = importlib.import_module("on_the_driver_only").Value()
        with pytest.raises(RankFailedError, match=r"No module named 'on_the_driver_only'; .* working_dir") as caught:
            group.call("greet", value, keep_on_failure=True)
        assert "Traceback" not in str(caught.value)
        assert group.call("greet") == [(0, "", ())]


def test_what_cannot_be_pickled_is_told_in_a_line() -> None:
    with WorkerGroup(Worker, 1, timeouts=Timeouts.of(Settings(startup_timeout_seconds=60))) as group:
        with pytest.raises(ClusterError, match="cannot be pickled: Could not serialize") as caught:
            group.call("greet", threading.Lock(), keep_on_failure=True)
        assert "\n" not in str(caught.value)
        assert group.call("greet") == [(0, "", ())]
