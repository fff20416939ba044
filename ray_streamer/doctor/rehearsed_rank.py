"""What does one rank do in a rehearsal? Import torch, meet the others, load its part, tell what it took; a process of its own.

Started by `rehearsal`, which writes a pickled request and the session's name to its standard input. Its answer goes to its standard output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from typing import TYPE_CHECKING

from ray_streamer.doctor.rehearsal import RehearsedRank
from ray_streamer.errors import RayStreamerError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.agreed_load import agreed_load

if TYPE_CHECKING:
    from ray_streamer.rank.request import LoadRequest


def load_part(request: LoadRequest, session_name: str, rank: int) -> RehearsedRank:
    """Loads this rank's part together with the others, and lets it go.

    Args:
        request: What to load.
        session_name: Under which the ranks of this rehearsal meet.
        rank: Which one this is.
    """
    # Opened before anything is measured: it imports torch.
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


def main() -> None:
    """Reads what to do, does it, and answers with what it took or with what it met."""
    request, session_name = pickle.load(sys.stdin.buffer)
    answer = sys.stdout.buffer
    # What libraries print is no part of it, and what is worth a warning the doctor has said already.
    sys.stdout = sys.stderr
    logging.disable(logging.WARNING)
    try:
        told: RehearsedRank | RayStreamerError = load_part(request, session_name, int(sys.argv[1]))
    except RayStreamerError as error:
        told = error
    answer.write(pickle.dumps(told))
    answer.flush()


if __name__ == "__main__":
    main()
