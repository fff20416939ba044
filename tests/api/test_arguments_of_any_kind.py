"""What callers give: other kinds of numbers, lists and iterators mean the same, and what cannot mean anything is a typed error."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ray_streamer
from ray_streamer import Move, RankSlices, Replicate, ResultSpec, Side, Skip
from ray_streamer.api.membership import find_membership
from ray_streamer.errors import PlanError, RayStreamerError, SettingsError, ShardingError

if TYPE_CHECKING:
    from collections.abc import Callable

ALONE: dict[str, Any] = {"rank": 0, "world_size": 1}
NORM = "model.norm.weight"
ONLY_NORM = {NORM: Replicate(), "*": Skip()}


def _load(checkpoint: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    return ray_streamer.load_rank(checkpoint.uri, **(ALONE | {"rules": ONLY_NORM} | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"rename": iter([(r"^model\.", "")])}, id="rename-iterator"),
        pytest.param({"rename": zip([r"^model\."], [""], strict=True)}, id="rename-zip"),
        pytest.param({"rename": {r"^model\.": ""}.items()}, id="rename-items"),
        pytest.param({"rename": [[r"^model\.", ""]]}, id="rename-lists"),
        pytest.param({"rules": iter(ONLY_NORM.items()), "rename": {"model.": ""}}, id="rules-iterator"),
        pytest.param({"rules": ONLY_NORM.items(), "rename": {"model.": ""}}, id="rules-items"),
    ],
)
def test_an_iterator_says_what_a_list_says(checkpoint: Any, arguments: dict[str, Any]) -> None:
    assert list(_load(checkpoint, **arguments)) == ["norm.weight"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"device": torch.device("cpu")}, id="torch-device"),
        pytest.param({"rank": np.int64(0), "world_size": np.int32(1)}, id="numpy-rank"),
        pytest.param({"dtype": torch.float32}, id="torch-dtype"),
    ],
)
def test_values_of_torch_and_numpy(checkpoint: Any, arguments: dict[str, Any]) -> None:
    (tensor,) = _load(checkpoint, **arguments).values()
    assert tensor.shape == (256,)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        pytest.param({"rank": "0", "world_size": "1"}, SettingsError, "rank is a whole number", id="rank-text"),
        pytest.param({"world_size": 1.0}, SettingsError, "world_size is a whole number", id="world-size-float"),
        pytest.param({"local_world_size": "1"}, SettingsError, "local_world_size is a whole", id="local-text"),
        pytest.param({"world_size": 2, "session": ""}, SettingsError, "session is empty", id="session-empty"),
        pytest.param({"tp": "1"}, SettingsError, "tp is a whole number", id="tp-text"),
        pytest.param({"tp": True}, SettingsError, "tp is a whole number", id="tp-truth"),
        pytest.param({"tp": 8}, SettingsError, "start the ranks with torchrun", id="tp-alone"),
        pytest.param({"mtp": "no"}, SettingsError, "mtp is True or False", id="mtp-text"),
        pytest.param({"device": 0}, ray_streamer.DeviceError, "device '0'", id="device-number"),
        pytest.param({"rename": {("a", "b"), ("b", "c")}}, ShardingError, "applied in turn", id="rename-set"),
        pytest.param({"rename": 5}, ShardingError, "rename is a function", id="rename-number"),
        pytest.param({"rules": {("*", Replicate())}}, ShardingError, "rules are a mapping", id="rules-set"),
        pytest.param({"fuse": {"qkv": {"q", "k"}}}, ShardingError, "in their order", id="fuse-set"),
        pytest.param({"fuse": {"qkv": 3}}, ShardingError, "needs a list", id="fuse-number"),
        pytest.param({"fuse": {"qkv": (1, 2)}}, ShardingError, "needs a list", id="fuse-numbers"),
        pytest.param({"fuse": {"qkv": ([1], [2])}}, ShardingError, "needs a list", id="fuse-lists"),
        pytest.param({"fuse": {"": ("a", "b")}}, ShardingError, "each by a text", id="fuse-nameless"),
        pytest.param({"out": [torch.zeros(1)]}, SettingsError, "out is a mapping", id="out-list"),
        pytest.param({"on_statistics": 3}, SettingsError, "on_statistics is a function", id="callback-number"),
        pytest.param({"settings": {"concurrency": 4}}, SettingsError, "settings is a ray_streamer", id="settings-dict"),
        pytest.param({"trace": 3}, SettingsError, "trace is the path of a file", id="trace-number"),
        pytest.param({"as_dtensor": True}, SettingsError, "as_dtensor is a device mesh", id="mesh-truth"),
        pytest.param({"slices": 42, "rules": None}, SettingsError, "slices is a function", id="slices-number"),
        pytest.param(
            {"slices": lambda *_: {}, "rules": None}, PlanError, "gave a dict for rank 0", id="slices-of-another-kind"
        ),
    ],
)
def test_what_cannot_mean_anything_is_told(
    checkpoint: Any, arguments: dict[str, Any], error: type[RayStreamerError], said: str
) -> None:
    with pytest.raises(error, match=said):
        _load(checkpoint, **arguments)


@pytest.mark.parametrize("name", ["placement", "on_progress", "trace", "settings", "slices"])
def test_what_ray_would_be_started_for_in_vain_is_told_before(checkpoint: Any, name: str) -> None:
    arguments: dict[str, Any] = {name: {"a": 1}}
    with pytest.raises(SettingsError, match=f"{name} is "):
        ray_streamer.load_sharded(checkpoint.uri, **arguments)


def test_a_group_that_is_none_is_told(checkpoint: Any) -> None:
    with pytest.raises(SettingsError, match=r"group is a torch\.distributed process group .* got str"):
        ray_streamer.load_rank(checkpoint.uri, group="world")  # type: ignore[arg-type]


def test_a_number_of_nodes_that_is_none_is_told(checkpoint: Any) -> None:
    with pytest.raises(PlanError, match="whole number, got '2'"):
        ray_streamer.plan(checkpoint.uri, 2, num_nodes="2")  # type: ignore[arg-type]


def _slices(make_move: Callable[[], Move], **columns: Any) -> Callable[..., RankSlices]:
    """The first four elements of the norm, by a move that is made when ranks are asked."""

    def source(index: Any, rank: int) -> RankSlices:
        result = ResultSpec(name="x", dtype="BF16", shape=[4])  # type: ignore[arg-type]
        said = RankSlices.from_rows(index, [result], [(NORM, "x", [make_move()])])
        names = ("results", "patterns", "tensor_ids", "result_ids", "pattern_ids", "target_offsets")
        return RankSlices(**({name: getattr(said, name) for name in names} | columns))

    return source


def _plain() -> Move:
    return Move((4,), Side(0, (1,)), Side(0, (1,)))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(_slices(_plain), id="plain"),
        pytest.param(_slices(lambda: Move([4], Side(0, [1]), Side(0, [1]))), id="lists"),  # type: ignore[arg-type]
        pytest.param(
            _slices(lambda: Move(np.array([4]), Side(np.int64(0), (np.int32(1),)), Side(0, (1,)))),  # type: ignore[arg-type]
            id="numpy",
        ),
        pytest.param(_slices(_plain, result_ids=[0], target_offsets=(0,)), id="columns-of-lists"),
    ],
)
def test_slices_of_lists_and_numpy_numbers(checkpoint: Any, source: Any) -> None:
    found = ray_streamer.load_rank(checkpoint.uri, slices=source, **ALONE)["x"]
    assert torch.equal(found, _load(checkpoint)[NORM][:4])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param(_slices(lambda: Move((4.0,), Side(0, (1,)), Side(0, (1,)))), "whole numbers", id="float"),  # type: ignore[arg-type]
        pytest.param(_slices(lambda: Move((4,), Side("0", (1,)), Side(0, (1,)))), "whole numbers", id="text"),  # type: ignore[arg-type]
        pytest.param(_slices(lambda: Move((4,), Side(10**30, (1,)), Side(0, (1,)))), "any memory", id="huge-offset"),
        pytest.param(_slices(lambda: Move((4,), Side(0, (1 << 62,)), Side(0, (1,)))), "elements of", id="huge-span"),
        pytest.param(_slices(_plain, target_offsets=np.array([0.5])), "whole numbers", id="column-of-floats"),
        pytest.param(_slices(_plain, tensor_ids=np.array([1 << 32])), "must fit int32", id="column-too-wide"),
        pytest.param(_slices(_plain, tensor_ids=np.array([[0]])), "2 dimensions", id="column-of-rows"),
        pytest.param(_slices(_plain, tensor_ids=np.array([True])), "whole numbers", id="column-of-truth"),
        pytest.param(lambda *_: ResultSpec(name=3, dtype="F32", shape=()), "name is text", id="nameless"),  # type: ignore[arg-type]
    ],
)
def test_slices_that_cannot_be_are_told(checkpoint: Any, source: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        ray_streamer.load_rank(checkpoint.uri, slices=source, **ALONE)


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "nodes"),
    [
        pytest.param("1", 2, ((0, 1), (2, 3)), id="of-two"),
        pytest.param("0", 1, ((0,), (1,), (2,), (3,)), id="of-one"),
        pytest.param("3", None, ((0, 1, 2, 3),), id="unsaid"),
    ],
)
def test_the_caller_says_how_many_ranks_of_the_environment_are_here(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, local_world_size: int | None, nodes: Any
) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    assert find_membership(None, None, local_world_size, None).topology.nodes == nodes


@pytest.mark.parametrize("local_world_size", [3, 4])
def test_what_contradicts_the_environment_is_told(monkeypatch: pytest.MonkeyPatch, local_world_size: int) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"local_world_size( dividing it, got .*={local_world_size}| puts it)"):
        find_membership(None, None, local_world_size, None)


def test_threads_that_take_from_one_stream_share_it(checkpoint: Any) -> None:
    stream = ray_streamer.stream_rank(checkpoint.uri, **ALONE)
    taken: list[str] = []
    threads = [threading.Thread(target=lambda: taken.extend(name for name, _ in stream)) for _ in range(3)]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(taken) == sorted(checkpoint.names)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"WORLD_SIZE": "1000000000"}, id="ranks"),
        pytest.param({"LOCAL_WORLD_SIZE": "9" * 5000}, id="digits"),
        pytest.param({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "9" * 30}, id="world-of-digits"),
    ],
)
def test_numbers_of_the_environment_that_no_cluster_has(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="WORLD_SIZE"):
        find_membership(None, None, None, None)


@pytest.mark.parametrize("name", ["PET_NNODES", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
@pytest.mark.parametrize("value", ["9" * 5000, "1(x99999999999)", "1(x999999999)", "٣", "1(x8),1(x999999999)"])
def test_what_is_no_number_of_ranks_says_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    job = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}
    for variable, said in ({"RANK": "1", "WORLD_SIZE": "8"} | job | {name: value}).items():
        monkeypatch.setenv(variable, said)
    assert find_membership(None, None, None, None).topology.nodes == (tuple(range(8)),)


@pytest.mark.parametrize(
    "sizes", [{"tp": 10**9}, {"tp": 2, "replicas": 10**6}, {"tp": 10**5000}], ids=["tp", "all", "digits"]
)
def test_more_ranks_than_any_cluster_has_are_told(checkpoint: Any, sizes: dict[str, int]) -> None:
    with pytest.raises(RayStreamerError, match=r"any cluster has|at most 1048576"):
        ray_streamer.plan(checkpoint.uri, **sizes)
