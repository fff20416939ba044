"""Which Ray does this process speak to? The one it is connected to, one that is named or found, else a local one.

    connected already                that one, whatever `address` says: a driver, a job's entrypoint, an actor or a task
    address given, or RAY_ADDRESS    that cluster; "local" starts one
    a cluster on this machine        what Ray's own "auto" finds
    nothing                          a local one, for this process alone

An address is tried before Ray is given it: Ray ends the whole process, after two minutes, when nobody answers there.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

import ray
import ray.util.client
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from ray_streamer.errors import ClusterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Attributes:
        address: Of the cluster's control service, `host:port`.
        is_opened_here: `connect` made the connection, so `close` ends it.
    """

    address: str
    is_opened_here: bool

    def close(self) -> None:
        """Disconnect, and stop a local Ray, if `connect` did the opposite; may be called again."""
        if self.is_opened_here and ray.is_initialized():
            ray.shutdown()


def connect(
    address: str | None = None, *, num_local_cpus: int | None = None, connect_timeout_seconds: float = 10.0
) -> Session:
    """Connect this process to Ray, quietly.

    Args:
        address: `host:port`, "auto", "local", or None to look for a cluster and start a local Ray when there is none.
            Ignored when this process is connected already.
        num_local_cpus: CPUs that a Ray started here counts; it has no other users, so they may exceed the machine's.
        connect_timeout_seconds: How long the cluster's address may take to answer.

    Raises:
        ClusterError: The address cannot be understood or reached, or is not one of a Ray of this version.
    """
    if ray.is_initialized():
        if ray.util.client.ray.is_connected():
            raise ClusterError(_NO_CLIENT)
        return Session(ray.get_runtime_context().gcs_address, is_opened_here=False)
    known = _find_cluster(address, connect_timeout_seconds)
    try:
        _initialise(address, known, num_local_cpus)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"cannot use Ray at {known or 'a local address'}: {error}") from error
    session = Session(ray.get_runtime_context().gcs_address, is_opened_here=True)
    logger.info("%s Ray at %s", "connected to" if known else "started", session.address)
    return session


_NO_CLIENT = (
    "Ray Client (ray://) keeps this process outside the cluster, where placement cannot be seen: submit the program "
    "with `ray job submit`, or run it on a node of the cluster"
)


def _find_cluster(address: str | None, connect_timeout_seconds: float) -> str | None:
    """`host:port` of the cluster that answers there, or None when a local Ray is to be started."""
    named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    if named and named.startswith("ray://"):
        raise ClusterError(_NO_CLIENT)
    try:
        # Private, but there is no public way to learn the address without using it.
        known = canonicalize_bootstrap_address(address)  # pyright: ignore[reportArgumentType]
        if known is None:
            return None
        host, _, port = known.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), connect_timeout_seconds).close()
    except (OSError, ValueError) as error:
        if not named and address is None:
            logger.info("the cluster that Ray remembers is gone (%s); starting a local one", error)
            return None
        origin = "RAY_ADDRESS" if named and named != address else "address"
        raise ClusterError(
            f"no Ray cluster answers at {origin}={named or address!r}: {error}. Give the host:port of its head node, "
            "unset it to start a local Ray, or start one with `ray start --head`"
        ) from error
    return known


def _initialise(address: str | None, known: str | None, num_local_cpus: int | None) -> None:
    if known is None:
        ray.init(
            address="local",
            num_cpus=num_local_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    else:
        # "auto" stays "auto": Ray reads its authentication token only for a cluster that it found itself.
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
