"""How does a command run as a job of a cluster, and how does it end here? Over the HTTP interface that `ray job submit` uses.

1. The address is the dashboard's, or the cluster's, which knows its dashboard.
2. The log comes as the job writes it. Where the connection that brings it breaks, the rest is asked for at the end.
3. The job's exit code is told.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shlex
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ray.exceptions import RayError

from ray_streamer.cluster.address import check_address, find_cluster, is_refusal, no_entry
from ray_streamer.errors import ClusterError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_PORTS = {"http": 80, "https": 443}
# Ray itself asks these in this order, and before what it is told.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job ended.

    Attributes:
        exit_code: Of its process, as a shell tells it; 0 only where Ray says that the job succeeded.
        status: "SUCCEEDED", "FAILED" or "STOPPED".
        message: What Ray says about it.
    """

    exit_code: int
    status: str
    message: str


class RayJob:
    """A job that a cluster has taken.

    Args:
        client: Speaks to the cluster's dashboard.
        job_id: What Ray calls the job.

    Attributes:
        job_id: The same.
        address: Of the dashboard.
    """

    def __init__(self, client: Any, job_id: str) -> None:
        self._client = client
        self.job_id = job_id
        self.address: str = client.get_address()

    def follow(self, tell: Callable[[str], None]) -> JobEnd:
        """Waits for the job's end; nothing else bounds that wait than what bounds the job itself.

        Args:
            tell: Called with each part of the log, as it comes. Interrupting the wait leaves the job as it is.

        Raises:
            ClusterError: The dashboard does not answer any more.
        """
        num_told = 0

        def count(text: str) -> None:
            nonlocal num_told
            num_told += len(text)
            tell(text)

        try:
            asyncio.run(self._tail(count))
        except Exception as error:  # also aiohttp's, as where a proxy before the dashboard lets no WebSocket through
            logger.warning("the log of %s comes at its end only: %s", self.job_id, error)
        with _job_errors_translated(self.address, "follow the job"):
            while not (info := self._client.get_job_info(self.job_id)).status.is_terminal():
                time.sleep(_POLL_SECONDS)
            rest = self._client.get_job_logs(self.job_id)[num_told:]
        if rest:
            tell(rest)
        status = str(info.status)
        return JobEnd(
            exit_code=_exit_code(status, info.driver_exit_code), status=status, message=(info.message or "").strip()
        )

    async def _tail(self, tell: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(self.job_id):
            tell(text)


def submit_job(
    entrypoint: Sequence[str],
    *,
    address: str | None,
    variables: Mapping[str, str],
    connect_timeout_seconds: float,
) -> RayJob:
    """Gives a command to a cluster, which runs it on its head node.

    Args:
        entrypoint: The command and its arguments.
        address: The dashboard's, such as http://head:8265, or the cluster's `host:port`; unset = RAY_API_SERVER_ADDRESS, else
            RAY_ADDRESS, else the cluster on this machine.
        variables: Of the job's environment; anyone who sees the dashboard sees them.
        connect_timeout_seconds: How long the address may take to answer.

    Raises:
        SettingsError: This environment lacks what Ray needs for jobs.
        ClusterError: No cluster answers there, it wants a token, or it does not take the job.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise SettingsError(
            'Ray cannot submit jobs from this environment; install what it needs: pip install "ray[default]"'
        )
    from ray.job_submission import JobSubmissionClient

    dashboard = find_dashboard(address, connect_timeout_seconds)
    with _job_errors_translated(dashboard, "submit the job"):
        client = JobSubmissionClient(dashboard)
        runtime_env = {"env_vars": dict(variables)} if variables else None
        return RayJob(client, client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env))


def find_dashboard(address: str | None, connect_timeout_seconds: float) -> str:
    """The address of the dashboard, at which something answers.

    Args:
        address: As in `submit_job`.
        connect_timeout_seconds: How long it may take to answer.

    Raises:
        ClusterError: No cluster, or none with a dashboard, answers there.
    """
    named = address or next((value for name in _ADDRESS_VARIABLES if (value := os.environ.get(name))), None)
    check_address(named)
    if named and named.startswith(("http://", "https://")):
        dashboard = named
    else:
        known = find_cluster(named, connect_timeout_seconds)
        if known is None:
            raise ClusterError(
                "no Ray cluster runs on this machine; give the address of one, such as address=http://HEAD:8265"
            )
        # What `ray job submit` asks, too; without a public name.
        from ray.dashboard.utils import ray_address_to_api_server_url

        with _job_errors_translated(known, "find the dashboard"):
            dashboard = ray_address_to_api_server_url(known)
    parts = urlsplit(dashboard)
    try:
        port = parts.port or _PORTS[parts.scheme]
        socket.create_connection((parts.hostname or "", port), connect_timeout_seconds).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {dashboard}: {error}. Give the http:// address that `ray start --head` printed; the head "
            'node needs "ray[default]"'
        ) from error
    return dashboard


@contextmanager
def _job_errors_translated(address: str, doing: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, OSError, RuntimeError, ValueError, RayError) as error:
        if is_refusal(error):
            raise no_entry(address, error) from error
        raise ClusterError(f"cannot {doing} at {address}: {str(error).rstrip('.')}") from error


def _exit_code(status: str, said: int | None) -> int:
    """The code of a shell.

    >>> _exit_code("SUCCEEDED", 0), _exit_code("FAILED", 3), _exit_code("FAILED", -9), _exit_code("STOPPED", None)
    (0, 3, 137, 1)
    """
    if status == "SUCCEEDED":
        return 0
    return 128 - said if said and said < 0 else said or 1
