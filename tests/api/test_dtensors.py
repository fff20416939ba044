"""`load_rank(as_dtensor=mesh)` in two processes: whole tensors come back from the parts, equal to the file's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from api_support import dtensor_tasks
from torch.distributed.device_mesh import DeviceMesh

import ray_streamer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from api_support.processes import RankProcesses

SHARDED = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}


def both(pair: RankProcesses, place: Path, function: Callable[..., Any], folder: str, **arguments: Any) -> list[Any]:
    for rank in range(2):
        pair.order(rank, function, folder=folder, store=str(place / "store"), rank=rank, world_size=2, **arguments)
    return [pair.answer(rank) for rank in range(2)]


@pytest.mark.parametrize(
    ("layout", "vocabulary"),
    [pytest.param("generic", 1001, id="uneven"), pytest.param("vllm", 1024, id="padded")],
)
def test_whole_tensors_are_those_of_the_files(
    pair: RankProcesses, checkpoint: Any, tmp_path: Path, layout: str, vocabulary: int
) -> None:
    answers = both(pair, tmp_path, dtensor_tasks.load, checkpoint.uri, layout=layout, out=True)
    assert answers[0] == answers[1]
    seen = answers[0]
    assert list(seen) == sorted(seen), "ranks that go through theirs meet in the collectives of each"
    assert seen.keys() == checkpoint.names
    assert [name for name, (_, _, is_same) in seen.items() if not is_same] == []
    for name, (placement, shape, _) in seen.items():
        projection = next((dim for part, dim in SHARDED.items() if f"{part}.weight" in name), None)
        vocabulary_part = 0 if "embed_tokens" in name or "lm_head" in name else None
        dim = projection if vocabulary_part is None else vocabulary_part
        assert placement == ("R" if dim is None else f"S({dim})"), name
        if vocabulary_part is not None:
            assert shape == (vocabulary, 256)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"fuse": True}, r"ShardingError: .* cannot be a DTensor over tp=2: .* fused", id="fused"),
        pytest.param(
            {"sizes": (1, 2)}, r'SettingsError: as_dtensor has 2 dimensions, none of which is called "tp"', id="unnamed"
        ),
        pytest.param({"tp": 1}, "SettingsError: as_dtensor is a mesh of 2 ranks for tensors that tp=1", id="replicas"),
    ],
)
def test_what_has_no_placement_is_refused(
    pair: RankProcesses, checkpoint: Any, tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    answers = both(pair, tmp_path, dtensor_tasks.refusal, checkpoint.uri, **{"sizes": (2,), **arguments})
    for answer in answers:
        assert re.match(said, answer), answer


def test_a_mesh_of_other_devices_is_refused(checkpoint: Any) -> None:
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    with pytest.raises(ray_streamer.SettingsError, match="mesh of cpu devices, and the tensors go to cuda"):
        ray_streamer.load_rank(checkpoint.uri, device="cuda", as_dtensor=mesh, rank=0, world_size=1)


def test_slices_of_the_callers_own_say_nothing_of_other_ranks(checkpoint: Any) -> None:
    class Line:
        ndim = 1

        def size(self) -> int:
            return 1

    with pytest.raises(ray_streamer.SettingsError, match="as_dtensor goes with rules"):
        ray_streamer.load_rank(checkpoint.uri, slices=lambda index, rank: None, as_dtensor=Line())  # type: ignore[arg-type,return-value]
