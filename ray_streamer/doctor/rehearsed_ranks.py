"""What do the ranks of a rehearsal do? Meet the others, load their part, tell what it took; each in a process of its own for each try.

    this process    imports torch, which is no part of a load, once for all
    ranks           begin as a copy of it, so that a try meets all that a process meets at its first load, and end with the try

Started by `rehearsal`, which writes pickled requests, one for each try, and a name to its standard input. The answer goes to its
standard output.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import sys
from typing import TYPE_CHECKING, cast

from ray_streamer.doctor.rehearsal import RehearsedRank
from ray_streamer.errors import ClusterError, RayStreamerError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.agreed_load import agreed_load

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

    from ray_streamer.rank.request import LoadRequest


def load_part(request: LoadRequest, session_name: str, rank: int) -> RehearsedRank:
    """Loads this rank's part together with the others, and lets it go.

    Args:
        request: What to load.
        session_name: Under which the ranks of this try meet.
        rank: Which one this is.
    """
    device = request.open_device(request.device)
    num_ranks = request.mesh.num_ranks
    place = Place(
        session=session_name,
        rank=rank,
        ranks=tuple(range(num_ranks)),
        node=os.uname().nodename,
        timeouts=Timeouts.of(request.settings),
    )
    with contextlib.ExitStack() as owned:
        session = owned.enter_context(NodeSession(place))
        storage = request.open_storage(num_sharers=num_ranks)
        owned.callback(storage.close)
        load = agreed_load(session, request, storage, device)
        load.run()
        return RehearsedRank(load.trace().to_bytes(), load.statistics())


def load_all_parts(request: LoadRequest, session_name: str) -> list[RehearsedRank]:
    """Loads the part of every rank, each in a copy of this process.

    Args:
        request: What to load.
        session_name: Under which the ranks meet.

    Raises:
        RayStreamerError: What a rank met; of several, the first one's.
        ClusterError: A rank ended without a word.
    """
    fork = multiprocessing.get_context("fork")
    ranks: list[tuple[Connection, ForkProcess]] = []
    for rank in range(request.mesh.num_ranks):
        ours, theirs = cast("tuple[Connection, Connection]", fork.Pipe(duplex=False))
        process = fork.Process(target=_tell, args=(theirs, request, session_name, rank))
        process.start()
        # The rank's end alone keeps it open, so that the end of the rank is heard.
        theirs.close()
        ranks.append((ours, process))
    told = [_told_by(ours, process, rank) for rank, (ours, process) in enumerate(ranks)]
    for each in told:
        if isinstance(each, RayStreamerError):
            raise each
    return [each for each in told if isinstance(each, RehearsedRank)]


def _tell(pipe: Connection, request: LoadRequest, session_name: str, rank: int) -> None:
    told: RehearsedRank | RayStreamerError
    try:
        told = load_part(request, session_name, rank)
    except RayStreamerError as error:
        told = error
    pipe.send(told)


def _told_by(pipe: Connection, process: ForkProcess, rank: int) -> RehearsedRank | RayStreamerError:
    with contextlib.closing(pipe):
        try:
            told: RehearsedRank | RayStreamerError = pipe.recv()
        except EOFError:
            process.join()
            return ClusterError(
                f"rank {rank} of a rehearsed load ended with exit code {process.exitcode} before it was done; what it said is above"
            )
    process.join()
    return told


def main() -> None:
    """Reads what to do, does it, and answers with what it took or with what a rank met."""
    requests, session_name = pickle.load(sys.stdin.buffer)
    answer = sys.stdout.buffer
    # What libraries print is no part of it, and what is worth a warning the doctor has said already.
    sys.stdout = sys.stderr
    logging.disable(logging.WARNING)
    told: list[list[RehearsedRank]] | RayStreamerError
    try:
        # Imports torch.
        requests[0].open_device(requests[0].device)
        told = [load_all_parts(request, f"{session_name}-{number}") for number, request in enumerate(requests)]
    except RayStreamerError as error:
        told = error
    answer.write(pickle.dumps(told))
    answer.flush()


if __name__ == "__main__":
    main()
