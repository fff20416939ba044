"""A process that has loaded, or loads, is forked: neither side waits for threads that only the other one has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from api_support import forking
from api_support.processes import RankProcesses

from ray_streamer.sharding import SplitVocabulary
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def process() -> Iterator[RankProcesses]:
    """A process that may be forked; no other test uses it, since torch is told to use two threads in it."""
    with RankProcesses(1) as processes:
        yield processes


def _told(process: RankProcesses, function: Any, **arguments: Any) -> Any:
    process.order(0, function, **arguments)
    return process.answer(0)


def test_a_stream_belongs_to_the_process_that_began_it(process: RankProcesses, checkpoint: Any) -> None:
    taken, closed, num_tensors = _told(process, forking.take_in_child, uri=checkpoint.uri)
    assert taken.startswith("ClusterError: process ")
    assert closed == "None"
    assert num_tensors == len(checkpoint.names)


def test_a_stream_that_was_not_begun_begins_in_the_child(process: RankProcesses, checkpoint: Any) -> None:
    assert _told(process, forking.take_first_in_child, uri=checkpoint.uri) == str(len(checkpoint.names))


def test_a_child_casts_and_pads_without_the_threads_of_torch(process: RankProcesses, tmp_path: Path) -> None:
    # More elements than torch gives one thread, in what is cast and in what is zeroed.
    specs = [TensorSpec(f"{number}.weight", "BF16", (1001, 256)) for number in range(4)]
    uri = str(write_checkpoint(tmp_path, specs, num_files=2))
    told = _told(
        process,
        forking.load_in_children,
        uri=uri,
        num_children=5,
        rules={"*": SplitVocabulary(pad_to=2048)},
        dtype="float32",
    )
    assert told == [str([False] * 4)] * 5
