"""Which error is the cause: Ray's own error values, no cluster."""

from __future__ import annotations

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from ray_streamer.cluster.failures import (
    FailedCall,
    choose_cause,
    explain_failure,
    ray_errors_translated,
    tell_failure,
)
from ray_streamer.errors import ClusterError, LoadAbortedError, RankFailedError, ShortReadError, StartupTimeoutError

NODES = ("node-a", "node-b", "node-c")


def raised(cause: BaseException) -> RayError:
    """The error that `ray.get` raises for a worker's error."""
    return RayTaskError("load", "Traceback of the worker", cause, "proc", 1, "127.0.0.2").as_instanceof_cause()


def failure(rank: int, cause: BaseException | str) -> FailedCall:
    return FailedCall(rank, cause, ActorDiedError())


ABORTED = failure(0, LoadAbortedError("rank 2 failed"))
BLAMES = failure(1, RankFailedError(2, "somewhere", "socket closed"))
REAL = failure(2, ShortReadError("truncated"))
DEATH = failure(2, "actor died: killed")
WAITED = failure(1, StartupTimeoutError("ranks [2] did not connect to rank 1", [2]))


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        pytest.param([ABORTED, BLAMES, REAL], REAL, id="an-error-of-ones-own-beats-echoes"),
        pytest.param([ABORTED, BLAMES, DEATH], DEATH, id="a-death-beats-echoes"),
        pytest.param([REAL, DEATH], REAL, id="the-first-of-two-causes"),
        pytest.param([ABORTED, BLAMES], BLAMES, id="blame-beats-abort"),
        pytest.param([WAITED, DEATH], DEATH, id="a-death-beats-a-wait-for-it"),
        pytest.param([ABORTED, WAITED], WAITED, id="a-wait-beats-abort"),
        pytest.param([ABORTED], ABORTED, id="nothing-better"),
    ],
)
def test_choose_cause(failures: list[FailedCall], expected: FailedCall) -> None:
    assert choose_cause(failures) is expected


def test_a_workers_error_is_unwrapped_and_carries_its_traceback() -> None:
    explained = explain_failure(2, raised(ShortReadError("truncated")))
    assert type(explained.cause) is ShortReadError
    assert explained.cause.__notes__[0].startswith("on rank 2, ")
    error = tell_failure(explained, NODES)
    assert (error.rank, error.node, error.cause) == (2, "node-c", explained.cause)
    assert error.__cause__ is explained.cause


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        pytest.param(ActorDiedError(), "actor died: The actor died unexpectedly", id="died"),
        pytest.param(OutOfMemoryError("node ran out"), "actor died: node ran out", id="killed-for-memory"),
        pytest.param(ActorUnavailableError("network", None), "actor unreachable: ", id="unreachable"),
    ],
)
def test_a_death_is_a_sentence(error: RayError, sentence: str) -> None:
    explained = explain_failure(1, error)
    assert isinstance(explained.cause, str)
    assert explained.cause.startswith(sentence)
    assert "\n" not in explained.cause
    assert tell_failure(explained, NODES).__cause__ is error


def test_what_ray_tells_of_other_processes_is_left_out() -> None:
    table = "Object store memory usage: [- objects spillable: 0\n]\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n1 0.5 serve --key=abc"
    explained = explain_failure(1, OutOfMemoryError(f"1 worker(s) were killed.\nOOM kill reason: usage\n{table}"))
    assert str(explained.cause).startswith("actor died: 1 worker(s) were killed. OOM kill reason: usage. Free memory")
    assert "key=abc" not in str(explained.cause)


def test_other_ray_errors_become_cluster_errors() -> None:
    lost = explain_failure(1, ObjectLostError("00", None, ""))
    assert type(lost.cause) is ClusterError
    nested = explain_failure(1, raised(ActorDiedError()))
    assert type(nested.cause) is ClusterError


def test_blame_is_told_of_the_blamed_rank_on_the_node_that_we_know() -> None:
    error = tell_failure(BLAMES, NODES)
    assert (error.rank, error.node, error.cause) == (2, "node-c", "socket closed")


def test_the_rank_that_was_waited_for_is_told_and_not_the_one_that_waited() -> None:
    error = tell_failure(explain_failure(1, raised(WAITED.cause)), NODES)
    assert (error.rank, error.node) == (2, "node-c")
    assert type(error.cause) is StartupTimeoutError
    assert str(error).startswith(
        "rank 2 on node node-c failed: StartupTimeoutError: ranks [2] did not connect to rank 1"
    )


def test_of_several_ranks_that_did_not_come_one_is_told_that_has_not_answered() -> None:
    waited = failure(0, StartupTimeoutError("ranks [1, 2] did not connect to rank 0", [1, 2]))
    assert tell_failure(waited, NODES, alive={0, 1}).rank == 2


def test_what_a_callers_function_says_of_ranks_is_about_other_ranks() -> None:
    nested = FailedCall(0, StartupTimeoutError("ranks [1] did not come", [1]), ActorDiedError(), is_callers=True)
    assert choose_cause([nested, REAL]) is nested
    assert tell_failure(nested, NODES).rank == 0


def test_blame_of_an_unknown_rank_stays_with_the_reporter() -> None:
    error = tell_failure(failure(1, RankFailedError(-1, "?", "somebody left")), NODES)
    assert error.rank == 1


def test_translation_leaves_other_errors_alone() -> None:
    with (
        pytest.raises(ClusterError, match="starting: ActorDiedError: The actor") as caught,
        ray_errors_translated("starting"),
    ):
        raise ActorDiedError
    assert isinstance(caught.value.__cause__, ActorDiedError)
    with pytest.raises(ShortReadError), ray_errors_translated("starting"):
        raise ShortReadError("mine")
