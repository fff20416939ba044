"""What can the driver see of a checkpoint before Ray and the ranks start? Whatever it sees wrong is told at once.

The driver reads the headers and plans, as `plan` does, in a thread of its own. What that finds means:

    no rule, a tp that does not divide, too little memory   the request's fault: told at once
    no such path, a malformed file                          told at once where the ranks see what the driver sees:
                                                            on one machine, and in an object store; else a warning
    no access                                               told at once where this process starts Ray, and so the ranks;
                                                            else nothing: the ranks may have what the driver lacks
    no answer                                               nothing: the ranks try for longer

A store that is slow to answer does not hold up the start: after a few seconds Ray starts beside it.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_streamer.errors import AccessError, CheckpointError, ObjectMissingError, RayStreamerError, StorageError
from ray_streamer.planning.limits import assumed_limits
from ray_streamer.planning.topology import Topology

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.rank.request import LoadRequest

logger = logging.getLogger(__name__)

# What headers of a large checkpoint take from a store nearby; `plan` on a small one takes a tenth.
_HEAD_START_SECONDS = 3.0
# The driver asks once; the ranks are the ones that try again.
_PATIENCE_SECONDS = 3.0


class Preflight:
    """A look at the checkpoint that begins when this is made.

    Args:
        request: What will be loaded.
    """

    def __init__(self, request: LoadRequest) -> None:
        self._request = request
        self._found: Future[CheckpointIndex | None] = Future()
        self._fault: RayStreamerError | None = None
        threading.Thread(target=self._look, name="ray_streamer-preflight", daemon=True).start()

    def check_request(self) -> None:
        """Give the look a head start, and raise what is wrong wherever the ranks may be."""
        error = self._error(_HEAD_START_SECONDS)
        if error is not None and not isinstance(error, StorageError | CheckpointError):
            raise error

    def check(
        self, *, is_one_machine: bool, is_own_environment: bool, is_own_ray: bool = False
    ) -> CheckpointIndex | None:
        """Raise what is wrong with the checkpoint, as far as it is known by now and the ranks would see the same.

        Args:
            is_one_machine: Whether all ranks will be on the machine of this process.
            is_own_environment: Whether ranks have the environment of this process, and so its object stores.
            is_own_ray: Whether this process is about to start Ray, whose processes have its user and its variables.

        Returns:
            What the headers say, where the ranks would read the same; None where it is not known.
        """
        self.check_request()
        is_seen_alike = is_own_environment and (self._request.is_remote or is_one_machine)
        error = self._error(0)
        if error is None:
            return self._found.result(0) if is_seen_alike and self._found.done() else None
        is_about_the_checkpoint = isinstance(error, ObjectMissingError | CheckpointError)
        is_final = is_about_the_checkpoint or (is_own_ray and isinstance(error, AccessError))
        if is_seen_alike and (is_final or not self._request.is_remote):
            raise error
        level = logging.WARNING if is_about_the_checkpoint else logging.INFO
        logger.log(level, "seen from %s: %s; the ranks look for themselves", os.uname().nodename, error)
        return None

    def _error(self, timeout_seconds: float) -> RayStreamerError | None:
        try:
            self._found.result(timeout_seconds)
        except FutureTimeoutError:
            return None
        return self._fault

    def _look(self) -> None:
        index = None
        try:
            index = self._read_and_plan()
        except RayStreamerError as error:
            self._fault = error
        except Exception as error:
            # Slices of the caller's own may need what only the ranks have.
            logger.info("this process cannot plan (%s: %s); the ranks do", type(error).__name__, error)
        finally:
            self._found.set_result(index)

    def _read_and_plan(self) -> CheckpointIndex:
        request = self._request
        settings = request.settings
        patience = {
            name: min(getattr(settings, name), _PATIENCE_SECONDS)
            for name in ("connect_timeout_seconds", "first_byte_timeout_seconds", "retry_deadline_seconds")
        }
        index = replace(request, settings=settings.model_copy(update=patience)).open_index()
        topology = Topology.even(request.mesh.num_ranks, 1)
        request.plan(topology, memory_limits=assumed_limits(topology, settings), index=index)
        return index
