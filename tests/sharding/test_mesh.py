from __future__ import annotations

import pickle

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.sharding import Mesh


def test_tp_varies_fastest_then_pp_then_dp() -> None:
    mesh = Mesh(tp=3, pp=2, dp=2)
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]
    assert coordinates == [{"tp": tp, "pp": pp, "dp": dp} for dp in range(2) for pp in range(2) for tp in range(3)]


def test_a_mesh_is_one_rank_unless_told_otherwise() -> None:
    assert Mesh().num_ranks == 1
    assert Mesh(tp=8) == Mesh(tp=8, pp=1, dp=1, ep=1) == pickle.loads(pickle.dumps(Mesh(tp=8)))


def test_axis_sizes() -> None:
    mesh = Mesh(tp=4, dp=2)
    assert {axis: mesh.axis_size(axis) for axis in mesh.axes} == {"tp": 4, "pp": 1, "dp": 2}
    with pytest.raises(SettingsError, match="tp, pp, dp, not 'ep'"):
        mesh.axis_size("ep")


@pytest.mark.parametrize(
    ("axis", "size"), [("tp", 0), ("tp", -1), ("dp", 0), ("pp", 0), ("ep", 0), ("tp", 2.0), ("tp", "2"), ("ep", True)]
)
def test_axes_are_whole_numbers_of_at_least_one(axis: str, size: object) -> None:
    with pytest.raises(SettingsError, match=f"axis {axis} .* got {size!r}"):
        Mesh(**{axis: size})  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 8])
def test_ranks_outside_the_mesh_are_refused(rank: int) -> None:
    with pytest.raises(SettingsError, match=f"rank {rank} is outside the 8 ranks"):
        Mesh(tp=4, dp=2).coordinate(rank)


@pytest.mark.parametrize(
    ("mesh", "groups", "expert_tp"),
    [
        pytest.param(Mesh(tp=4, dp=2), [0] * 8, 4, id="every-expert-cut-over-tp"),
        pytest.param(Mesh(tp=4, dp=2, ep=2), [0, 0, 1, 1] * 2, 2, id="tp-inside-experts"),
        pytest.param(Mesh(tp=4, dp=2, ep=4), [0, 1, 2, 3] * 2, 1, id="within-a-replica"),
        pytest.param(Mesh(tp=2, dp=4, ep=4), [0, 1, 2, 3] * 2, 1, id="over-two-replicas"),
        pytest.param(Mesh(tp=1, dp=4, ep=4), [0, 1, 2, 3], 1, id="data-parallel-attention"),
        pytest.param(Mesh(tp=2, pp=2, dp=2, ep=2), [0, 1] * 4, 1, id="in-every-stage"),
        pytest.param(Mesh(tp=2, pp=2, dp=2, ep=4), [0, 1, 0, 1, 2, 3, 2, 3], 1, id="over-replicas-in-every-stage"),
    ],
)
def test_groups_of_experts(mesh: Mesh, groups: list[int], expert_tp: int) -> None:
    assert [mesh.expert_group(rank) for rank in range(mesh.num_ranks)] == groups
    assert mesh.expert_tp == expert_tp


@pytest.mark.parametrize(("tp", "dp", "ep"), [(4, 1, 3), (4, 1, 8), (4, 2, 6), (2, 3, 4), (1, 4, 3)])
def test_groups_of_experts_that_fit_no_ranks_are_refused(tp: int, dp: int, ep: int) -> None:
    with pytest.raises(SettingsError, match=f"ep={ep} groups of experts fit neither tp={tp} nor dp={dp}"):
        Mesh(tp=tp, dp=dp, ep=ep)
