"""The arithmetic of placement, without Ray."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.cluster.placement import (
    NodeRoom,
    PlacementOptions,
    check_room,
    choose_bundles,
    choose_strategy,
    count_ranks,
    group_by_node,
    order_by_node,
)
from ray_streamer.errors import ClusterError, SettingsError

NODE_IDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=8)


def rooms(*sizes: int) -> list[NodeRoom]:
    return [NodeRoom(f"node{number}", {"CPU": size}, size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("resources", "bundle", "expected"),
    [
        pytest.param({"CPU": 4.0}, {"CPU": 1}, 4, id="whole"),
        pytest.param({"CPU": 0.3}, {"CPU": 0.1}, 3, id="fractions-without-rounding-loss"),
        pytest.param({"CPU": 64, "GPU": 3}, {"CPU": 4, "GPU": 1}, 3, id="scarcest-decides"),
        pytest.param({"CPU": 64}, {"CPU": 1, "GPU": 1}, 0, id="absent-resource"),
        pytest.param({"CPU": 1.5}, {"CPU": 1}, 1, id="remainder-is-no-rank"),
    ],
)
def test_count_ranks(resources: dict[str, float], bundle: dict[str, float], expected: int) -> None:
    assert count_ranks(resources, bundle) == expected


@pytest.mark.parametrize(
    ("strategy", "sizes", "num_ranks", "expected"),
    [
        pytest.param("auto", (2, 4), 4, "STRICT_PACK", id="one-node-holds-all"),
        pytest.param("auto", (2, 4), 5, "PACK", id="no-node-holds-all"),
        pytest.param("auto", (), 1, "PACK", id="no-nodes-yet"),
        pytest.param("SPREAD", (8,), 2, "SPREAD", id="asked-for"),
    ],
)
def test_choose_strategy(strategy: Any, sizes: tuple[int, ...], num_ranks: int, expected: str) -> None:
    assert choose_strategy(strategy, rooms(*sizes), num_ranks) == expected


@pytest.mark.parametrize(
    ("strategy", "sizes", "num_ranks"),
    [
        pytest.param("PACK", (2, 2), 5, id="pack-more-than-all"),
        pytest.param("SPREAD", (2, 2), 5, id="spread-more-than-all"),
        pytest.param("STRICT_PACK", (2, 2), 3, id="strict-pack-more-than-one-node"),
        pytest.param("STRICT_SPREAD", (4, 4, 0), 3, id="strict-spread-more-than-nodes-with-room"),
        pytest.param("PACK", (), 1, id="no-nodes"),
    ],
)
def test_check_room_refuses_what_can_never_fit(strategy: str, sizes: tuple[int, ...], num_ranks: int) -> None:
    with pytest.raises(ClusterError, match=f"{num_ranks} ranks? with CPU 1 each, placed {strategy}, cannot fit"):
        check_room(strategy, rooms(*sizes), num_ranks, {"CPU": 1})
    check_room(strategy, rooms(*sizes, 4, 4), num_ranks - 1, {"CPU": 1})


@pytest.mark.parametrize(
    ("sizes", "node_ids", "num_ranks", "expected"),
    [
        pytest.param([1, 1, 1, 1], "abab", 2, (0, 2), id="one-node-rather-than-the-first-bundles"),
        pytest.param([1, 1, 1], "aab", 3, (0, 1, 2), id="all"),
        pytest.param([0, 1, 1, 0], "aabb", 2, (1, 2), id="full-bundles-are-skipped"),
        pytest.param([4, 4], "ab", 6, (0, 0, 0, 0, 1, 1), id="several-ranks-per-bundle"),
        pytest.param([1, 1], "ab", 3, None, id="too-few"),
        pytest.param([], "", 1, None, id="none"),
    ],
)
def test_choose_bundles(sizes: list[int], node_ids: str, num_ranks: int, expected: tuple[int, ...] | None) -> None:
    assert choose_bundles(sizes, list(node_ids), num_ranks) == expected


@given(NODE_IDS, st.sampled_from("abcd"))
def test_ordered_ranks_are_a_permutation_with_contiguous_nodes(node_ids: list[str], first: str) -> None:
    order = order_by_node(node_ids, first=first)
    assert sorted(order) == list(range(len(node_ids)))
    ordered = [node_ids[index] for index in order]
    assert [rank for ranks in group_by_node(ordered) for rank in ranks] == list(range(len(node_ids)))
    assert first not in node_ids or ordered[0] == first


@given(NODE_IDS)
def test_group_by_node_keeps_every_rank_with_its_node(node_ids: list[str]) -> None:
    groups = group_by_node(node_ids)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(len(node_ids)))
    assert len(groups) == len(set(node_ids))
    assert all(len({node_ids[rank] for rank in ranks}) == 1 for ranks in groups)


# What is asked of a placement group before Ray is.
GROUP = SimpleNamespace(ready=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"num_cpus_per_rank": -1}, "CPU=-1 per rank", id="negative"),
        pytest.param({"num_cpus_per_rank": float("nan")}, "CPU=nan per rank: need a number", id="nan"),
        pytest.param({"num_gpus_per_rank": float("inf")}, "GPU=inf per rank: need a number", id="infinite"),
        pytest.param({"num_cpus_per_rank": "1"}, "CPU='1' per rank: need a number", id="text"),
        pytest.param({"resources": {"nic": None}}, "nic=None per rank: need a number", id="nothing"),
        pytest.param({"resources": ["nic"]}, "resources are a mapping .*, got list", id="list-of-resources"),
        pytest.param({"strategy": "pack"}, "strategy is one of auto, .*, not 'pack'", id="unknown-strategy"),
        pytest.param({"num_cpus_per_rank": 1e-5}, "at least 0.0001", id="finer-than-ray-counts"),
        pytest.param({"num_gpus_per_rank": 1.5}, "whole number", id="one-and-a-half-gpus"),
        pytest.param({"resources": {"GPU": 1}}, "may not name", id="gpu-as-custom-resource"),
        pytest.param({"bundle_indices": [0]}, "need the placement_group", id="indices-without-group"),
        pytest.param({"bundle_indices": 5, "placement_group": GROUP}, "bundle_indices are a list", id="one-index"),
        pytest.param({"bundle_indices": ["0"], "placement_group": GROUP}, "bundle_indices are a", id="index-as-text"),
        pytest.param(
            {"placement_group": [{"CPU": 1}]}, "placement_group is one that ray.*got list", id="bundles-as-group"
        ),
        pytest.param({"runtime_env": "env.yaml"}, "runtime_env is a mapping", id="runtime-env-as-text"),
        pytest.param({"label_selector": "zone=far"}, "label_selector is a mapping", id="labels-as-text"),
        pytest.param(
            {"label_selector": {"zone": 5}}, "label_selector is a mapping of label to text", id="label-as-number"
        ),
        pytest.param(
            {"placement_group": GROUP, "label_selector": {"a": "b"}}, "is placed already", id="labels-in-group"
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PlacementOptions(**options)


def test_the_bundle_leaves_out_what_is_not_reserved() -> None:
    assert PlacementOptions(num_cpus_per_rank=0, num_gpus_per_rank=0.5, resources={"nic": 1}).bundle == {
        "GPU": 0.5,
        "nic": 1,
    }
    assert PlacementOptions(num_cpus_per_rank=0).bundle == {}


def test_options_survive_pickling() -> None:
    options = PlacementOptions(resources={"nic": 1}, label_selector={"zone": "far"})
    assert pickle.loads(pickle.dumps(options)) == options
