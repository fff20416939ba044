"""A neighbour process is killed with SIGKILL in the middle: the survivors name it, and nothing of it is left anywhere."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_streamer.errors import RankFailedError
from ray_streamer.planning.topology import Topology
from ray_streamer.testing.parts import TensorPart

SHAPE = (40 * 4096,)


@pytest.mark.parametrize("where", ["read", "deliver"])
def test_survivors_name_the_killed_process(ranks, tmp_path, where):
    folder = ranks.write(tmp_path / "checkpoint", [[("shared", "U8", SHAPE)]])
    plan = ranks.plan(str(folder), {"shared": (TensorPart.whole(SHAPE),) * 3}, topology=Topology.even(3))
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    session = secrets.token_hex(8)
    shared_memory = set(os.listdir("/dev/shm"))
    with ranks.nothing_left():
        # The test's sessions end in the number of their node.
        command = [sys.executable, str(Path(__file__).with_name("stuck_rank.py")), str(tmp_path / "plan"), "2"]
        with subprocess.Popen(
            [*command, f"{session}-0", where], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            try:
                running = ranks.prepare(plan, ranks=[0, 1], session=session, memory_limit=2 * 4096).start()
                assert process.stdout is not None
                assert process.stdout.readline() == b"stuck\n"
                assert all(thread.is_alive() for thread in running.threads)
            finally:
                process.kill()
            outcomes = running.join()
            assert process.wait() == -signal.SIGKILL
        for outcome in outcomes:
            assert isinstance(outcome, RankFailedError)
            assert (outcome.rank, outcome.node) == (2, "node-0")
            assert "its process ended" in str(outcome)
    # Others may use this folder meanwhile; what is ours is called so.
    assert not [name for name in set(os.listdir("/dev/shm")) - shared_memory if "ray_streamer" in name]
    assert not ranks.sockets_named([session])
    # The next load works.
    tensors = ranks.prepare(plan).start().tensors()
    assert all(rank_tensors["shared"].shape == SHAPE for rank_tensors in tensors)
