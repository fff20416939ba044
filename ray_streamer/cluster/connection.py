"""Which Ray does this process speak to? The one it is connected to, one that is named or found, else a local one.

    connected already                that one, whatever `address` says: a driver, a job's entrypoint, an actor or a task
    address given, or RAY_ADDRESS    that cluster; "local" starts one
    a cluster on this machine        what Ray's own "auto" finds
    nothing                          a local one, for this process alone

One thread at a time: of two that load at once, one starts Ray and the other finds it. A Ray that is started here lives
as long as this process, also when the thread that loaded ends.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.util.client
from ray._private import worker
from ray._private.node import Node

from ray_streamer.cluster.address import NO_CLIENT, check_address, find_cluster, resolved
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_connecting = threading.Lock()
# Ray's threads are the parent's: what asks it something here waits for ever.
_is_forked = threading.Event()


def _note_fork() -> None:
    if ray.is_initialized():
        _is_forked.set()


os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True, slots=True)
class RayConnection:
    """A connection to Ray.

    Attributes:
        address: Of the cluster's control service, `host:port`.
        is_opened_here: `connect` made the connection, so `close` ends it.
    """

    address: str
    is_opened_here: bool

    def close(self) -> None:
        """Disconnect, and stop a local Ray, if `connect` did the opposite; may be called again."""
        with _connecting:
            if self.is_opened_here and ray.is_initialized():
                ray.shutdown()
                while _lasting_threads:
                    _lasting_threads.pop().end()


def connect(
    address: str | None = None, *, num_local_cpus: int | None = None, connect_timeout_seconds: float = 10.0
) -> RayConnection:
    """Connect this process to Ray; what its tasks and actors print reaches this process, as Ray has it.

    Threads that call it at the same time share one connection.

    Args:
        address: `host:port`, "auto", "local", or None to look for a cluster and start a local Ray when there is none.
            Not used when this process is connected already.
        num_local_cpus: CPUs that a Ray started here counts; it has no other users, so they may exceed the machine's.
        connect_timeout_seconds: How long the cluster's address may take to answer.

    Raises:
        ClusterError: The address cannot be understood or reached, asks for a token, or is not one of a Ray of this
            version; or this process has started a Ray, and the address is that of another one; or it was forked from one that was connected.
    """
    check_address(address)
    if _is_forked.is_set():
        raise ClusterError(
            "this process was forked from one that was connected to Ray, and Ray does not work in it; load before the fork, or start this "
            'process with multiprocessing.get_context("spawn")'
        )
    with _connecting:
        if ray.is_initialized():
            return _existing(address)
        known = find_cluster(address, connect_timeout_seconds)
        try:
            _initialise(known, num_local_cpus)
        except Exception as error:  # Ray has no class for most of what can go wrong
            if ray.is_initialized():  # by a thread that did not come through here
                return _existing(address)
            raise _unusable(known, error) from error
        connection = RayConnection(ray.get_runtime_context().gcs_address, is_opened_here=True)
    logger.info("%s Ray at %s", "connected to" if known else "started", connection.address)
    return connection


def starts_local_ray(address: str | None = None, *, connect_timeout_seconds: float = 10.0) -> bool:
    """Whether `connect` with this address would start a Ray of its own, for this process alone.

    Raises:
        ClusterError: As `connect` does.
    """
    return not ray.is_initialized() and find_cluster(address, connect_timeout_seconds) is None


def is_one_machine() -> bool:
    """Whether the Ray that this process speaks to has one node."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def has_same_variables(runtime_env: Mapping[str, Any] | None) -> bool:
    """Whether a runtime environment, and that of the job, give actors no other variables than this process has."""
    of_the_job: Any = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    asked: Mapping[str, Any] = runtime_env or {}
    variables: dict[str, str] = {**of_the_job.get("env_vars", {}), **asked.get("env_vars", {})}
    return all(os.environ.get(name) == value for name, value in variables.items())


def _existing(address: str | None) -> RayConnection:
    if ray.util.client.ray.is_connected():
        raise ClusterError(NO_CLIENT)
    known = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", "local") and resolved(address) != known:
        if _is_local_ray():
            raise ClusterError(
                f"this process has started a Ray of its own, at {known}, and address={address!r} is another one; call "
                "ray.shutdown() first"
            )
        # One cluster may have several addresses, such as that of a Kubernetes service.
        logger.warning(
            "address=%r is not used: this process is connected to the Ray at %s already. If these are two clusters, call "
            "ray.shutdown() first",
            address,
            known,
        )
    return RayConnection(known, is_opened_here=False)


def _is_local_ray() -> bool:
    """Whether this process has started the Ray that it is connected to."""
    node = worker._global_node  # pyright: ignore[reportPrivateUsage]  # there is no public way
    return node is not None and node.is_head()


def _unusable(known: str | None, error: Exception) -> ClusterError:
    reason = str(error).rstrip(".")
    if known is not None:
        return ClusterError(f"cannot use Ray at {known}: {reason}")
    return ClusterError(
        f"cannot start a local Ray: {reason}. Its folder, {os.environ.get('RAY_TMPDIR') or '/tmp'}/ray, must be writable and have "
        "room; set RAY_TMPDIR to use another one. On a busy machine Ray may also give up after 30 s: try again"
    )


def _initialise(known: str | None, num_local_cpus: int | None) -> None:
    # Ray's own news of the connection are quiet; what tasks and actors print is the caller's.
    if known is not None:
        # Not "auto": with it Ray would use this user's token, also where the cluster has none, and then no actor starts.
        ray.init(address=known, logging_level=logging.WARNING)
        return

    def start() -> None:
        try:
            ray.init(address="local", num_cpus=num_local_cpus, include_dashboard=False, logging_level=logging.WARNING)
        except BaseException as error:
            _end_half_started(error)
            raise

    if threading.current_thread() is threading.main_thread():
        start()
    else:
        _lasting_threads.append(_LastingThread(start))


def _end_half_started(error: BaseException) -> None:
    """Ends the processes of a Ray that did not come up, which Ray itself leaves until this process ends."""
    if ray.is_initialized():
        return
    trace = error.__traceback__
    while trace is not None:
        # Ray tells nobody of a node whose start failed.
        node = trace.tb_frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False)
        trace = trace.tb_next
    ray.shutdown()


class _LastingThread:
    """A thread that outlives the call that it is for: Linux kills Ray's processes with the thread that forked them.

    Args:
        start: What to call in it.
    """

    def __init__(self, start: Callable[[], object]) -> None:
        self._start = start
        self._started: Future[None] = Future()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray_streamer-ray", daemon=True)
        self._thread.start()
        self._started.result()

    def end(self) -> None:
        """Let the thread go, after what it started has ended."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)
            self._is_over.wait()


# Those of Rays that other threads than the main one have started here; more than one where the caller shut Ray down.
_lasting_threads: list[_LastingThread] = []
