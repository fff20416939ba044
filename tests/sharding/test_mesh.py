from __future__ import annotations

import pickle

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.sharding import Mesh


def test_rank_is_dp_index_times_tp_plus_tp_index() -> None:
    mesh = Mesh(tp=3, dp=2)
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]
    assert coordinates == [{"tp": tp, "dp": dp} for dp in range(2) for tp in range(3)]


def test_a_mesh_is_one_rank_unless_told_otherwise() -> None:
    assert Mesh().num_ranks == 1
    assert Mesh(tp=8) == Mesh(tp=8, dp=1) == pickle.loads(pickle.dumps(Mesh(tp=8)))


def test_axis_sizes() -> None:
    mesh = Mesh(tp=4, dp=2)
    assert {axis: mesh.axis_size(axis) for axis in mesh.axes} == {"tp": 4, "dp": 2}
    with pytest.raises(SettingsError, match="tp, dp, not 'ep'"):
        mesh.axis_size("ep")


@pytest.mark.parametrize(("axis", "size"), [("tp", 0), ("tp", -1), ("dp", 0), ("tp", 2.0), ("tp", "2"), ("tp", True)])
def test_axes_are_whole_numbers_of_at_least_one(axis: str, size: object) -> None:
    with pytest.raises(SettingsError, match=f"axis {axis} .* got {size!r}"):
        Mesh(**{axis: size})  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 8])
def test_ranks_outside_the_mesh_are_refused(rank: int) -> None:
    with pytest.raises(SettingsError, match=f"rank {rank} is outside the 8 ranks"):
        Mesh(tp=4, dp=2).coordinate(rank)
