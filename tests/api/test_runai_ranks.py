"""Ranks of a gloo group that stream through the API of Run:ai's streamer: each byte is read by one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from api_support import runai_tasks

from ray_streamer.errors import RankFailedError

if TYPE_CHECKING:
    from pathlib import Path

    from api_support.processes import RankProcesses


def on_both(
    pair: RankProcesses, function: Any, tmp_path: Path, per_rank: list[dict[str, Any]], **environment: str
) -> list[Any]:
    """What both ranks of a new group say."""
    for rank, arguments in enumerate(per_rank):
        keywords = {"store": str(tmp_path / "store"), "rank": rank, **arguments}
        pair.order(rank, function, environment=environment, **keywords)
    return [pair.answer(rank) for rank in range(2)]


@pytest.mark.parametrize("limit", ["", "0", "-1", "2000000"])
def test_each_byte_is_read_once_and_both_have_all(
    pair: RankProcesses, checkpoint: Any, tmp_path: Path, limit: str
) -> None:
    arguments = [{"folder": checkpoint.uri, "is_distributed": True}] * 2
    answers = on_both(pair, runai_tasks.stream, tmp_path, arguments, RUNAI_STREAMER_MEMORY_LIMIT=limit)
    assert [answer.wrong for answer in answers] == [[], []]
    assert [answer.names for answer in answers] == [sorted(checkpoint.names)] * 2
    assert [answer.group_sizes for answer in answers] == [{2}, {2}]
    # Cells at the ends of tensors, and nothing twice.
    assert sum(answer.bytes_read for answer in answers) < 1.2 * checkpoint.num_bytes


def test_ranks_that_read_for_themselves(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    arguments = [{"folder": checkpoint.uri, "is_distributed": True}] * 2
    answers = on_both(pair, runai_tasks.stream, tmp_path, arguments, RUNAI_STREAMER_DIST="0")
    assert [answer.wrong for answer in answers] == [[], []]
    assert sum(answer.bytes_read for answer in answers) >= 2 * checkpoint.num_bytes


def test_ranks_may_want_different_tensors(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    names = sorted(checkpoint.names)
    arguments = [
        {"folder": checkpoint.uri, "is_distributed": True, "tensor_names": some} for some in (names[::3], names[1::2])
    ]
    answers = on_both(pair, runai_tasks.stream, tmp_path, arguments)
    assert [answer.wrong for answer in answers] == [[], []]
    assert [answer.names for answer in answers] == [names[::3], names[1::2]]


def test_what_is_wrong_with_a_file_is_every_ranks_error(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes(b"junk that is long enough")
    arguments = [{"folder": str(folder), "is_distributed": True}] * 2
    answers = on_both(pair, runai_tasks.stream, tmp_path, arguments)
    assert all(isinstance(answer, ValueError) and "broken.safetensors" in str(answer) for answer in answers)


def test_a_rank_that_stops_taking_is_named(pair: RankProcesses, checkpoint: Any, tmp_path: Path) -> None:
    arguments = [{"folder": checkpoint.uri, "is_distributed": True, "stops_after": after} for after in (1, None)]
    # Windows so small that the other one cannot be through.
    answers = on_both(pair, runai_tasks.stream, tmp_path, arguments, RUNAI_STREAMER_MEMORY_LIMIT="0")
    assert isinstance(answers[1], RankFailedError)
    assert answers[1].rank == 0
