"""The four functions take the same arguments for the same things, and what does not fit together is refused before any I/O."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import ray_streamer
from ray_streamer import Mesh, RuleSlices, Settings, SettingsError, load_rank, load_sharded, plan, stream_rank
from ray_streamer.api.arguments import Sharding
from ray_streamer.errors import LoadAbortedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FUNCTIONS = [load_sharded, load_rank, stream_rank, plan]
NOWHERE = "s3://no-such-bucket-of-anybody/model"


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_signature_shows_every_argument(function: Callable[..., Any]) -> None:
    parameters = parameters_of(function)
    assert {parameter.kind for parameter in parameters.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert {
        "uri",
        "tp",
        "pp",
        "ep",
        "settings",
        "concurrency",
        "memory_limit",
        "node_memory_limit",
    } <= parameters.keys()
    documented = {line.split(":")[0].strip() for line in (function.__doc__ or "").splitlines() if ":" in line}
    assert parameters.keys() <= documented


def test_an_argument_means_the_same_and_has_the_same_default_everywhere() -> None:
    told: dict[str, set[tuple[Any, Any]]] = {}
    for function in FUNCTIONS:
        for name, parameter in parameters_of(function).items():
            told.setdefault(name, set()).add((parameter.annotation, repr(parameter.default)))
    assert [name for name, ways in told.items() if len(ways) > 1] == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_of_which_part_has_its_one_default(function: Callable[..., Any]) -> None:
    parameters, sharding = parameters_of(function), Sharding()
    names = [name for name in Sharding.__dataclass_fields__ if name != "replicas"]
    assert {name: parameters[name].default for name in names} == {name: getattr(sharding, name) for name in names}


def test_rule_slices_and_the_functions_have_the_same_defaults() -> None:
    by_itself, parameters = RuleSlices(), parameters_of(plan)
    for name in ("unmatched", "layout", "mtp", "experts", "fuse", "rename", "dtype"):
        assert parameters[name].default == getattr(by_itself, name)


def test_an_argument_wins_over_settings(checkpoint: Any) -> None:
    settings = Settings(memory_limit=16 << 20, block_bytes=8 << 20, concurrency=1)
    assert plan(checkpoint.uri, settings=settings).limits.block_bytes == 8 << 20
    assert plan(checkpoint.uri, settings=settings, memory_limit="1MiB").limits.block_bytes <= 1 << 20
    assert plan(checkpoint.uri, settings=settings, node_memory_limit=1 << 20).limits.block_bytes <= 1 << 20
    statistics: list[Any] = []
    load_rank(
        checkpoint.uri,
        rank=0,
        world_size=1,
        settings=settings,
        memory_limit="1MiB",
        on_statistics=statistics.append,
    )
    assert 0 < statistics[0].memory_limit <= 1 << 20


@pytest.mark.parametrize("function", [load_sharded, plan], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"tp": 4}, "slices are for tp=2, .* say tp=4", id="tp"),
        pytest.param({"tp": 2, "replicas": 2}, "replicas=1, .* replicas=2", id="replicas"),
        pytest.param({"tp": 2, "pp": 2}, "pp=1, .* pp=2", id="pp"),
        pytest.param({"tp": 2, "ep": True}, "ep=1, .* ep=2", id="ep"),
    ],
)
def test_slices_for_another_mesh_are_refused_before_anything_is_read(
    function: Callable[..., Any], arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        function(NOWHERE, slices=RuleSlices(mesh=Mesh(tp=2)), **arguments)


@pytest.mark.parametrize(
    ("mesh", "arguments", "said"),
    [
        pytest.param(Mesh(tp=4), {}, "takes 4 ranks, and this load has 2", id="number-of-ranks"),
        pytest.param(Mesh(pp=2), {"tp": 2}, "tp=1, pp=2, .* say tp=2, pp=1", id="tp"),
        pytest.param(Mesh(tp=2, ep=2), {"tp": 2}, "ep=2, .* ep=1", id="ep"),
    ],
)
def test_slices_for_other_ranks_are_refused_before_anything_is_read(
    mesh: Mesh, arguments: dict[str, Any], said: str
) -> None:
    ranks = {"rank": 0, "world_size": 2, "local_world_size": 1}
    with pytest.raises(SettingsError, match=said):
        load_rank(NOWHERE, slices=RuleSlices(mesh=mesh), **arguments, **ranks)


def test_the_mesh_of_slices_stands_for_the_sizes_that_are_left_out(checkpoint: Any) -> None:
    whole = RuleSlices(mesh=Mesh(tp=2, dp=2))
    assert plan(checkpoint.uri, slices=whole).topology.num_ranks == 4
    assert plan(checkpoint.uri, slices=whole).plan_hash == plan(checkpoint.uri, tp=2, replicas=2).plan_hash
    ranks: Any = {"rank": 1, "world_size": 2, "local_world_size": 1}
    cut = load_rank(checkpoint.uri, slices=RuleSlices(mesh=Mesh(tp=2)), **ranks)
    same = load_rank(checkpoint.uri, tp=2, **ranks)
    assert {name: tensor.shape for name, tensor in cut.items()} == {name: tensor.shape for name, tensor in same.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"unmatched": "replicate"},
        {"mtp": True},
        {"layout": "vllm"},
        {"fuse": True},
        {"pp": (1, 1)},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_what_slices_say_already_is_not_said_beside_them(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="slices"):
        ray_streamer.plan(NOWHERE, slices=RuleSlices(), **arguments)


def test_a_stream_is_of_the_folder_and_the_rules_that_were_there_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("first", "second")):
        (tmp_path / name / "model").mkdir(parents=True)
        save_file({"w": torch.full((4,), float(number))}, tmp_path / name / "model" / "model.safetensors")
    rules = {"w": ray_streamer.Replicate()}
    monkeypatch.chdir(tmp_path / "first")
    stream = ray_streamer.stream_rank("model", rank=0, world_size=1, rules=rules)
    monkeypatch.chdir(tmp_path / "second")
    rules["w"] = ray_streamer.Skip()
    assert [(name, tensor.tolist()) for name, tensor in stream] == [("w", [0.0] * 4)]


def test_a_stream_that_ended_early_does_not_look_complete(tmp_path: Path) -> None:
    """Another thread may have closed it, or seen the error of the load."""
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    for stream in (ray_streamer.stream_rank(str(tmp_path), rank=0, world_size=1) for _ in range(2)):
        stream.close()
        with pytest.raises(LoadAbortedError, match="before its last tensor was taken"):
            next(stream)
    stream = ray_streamer.stream_rank(str(tmp_path), rank=0, world_size=1)
    assert len(list(stream)) == 1
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize(
    ("argument", "of_ranks", "said"),
    [
        (
            "tp",
            (1, 2),
            "other sizes than rank 1, 'tp=1, pp=1, ep=1, replicas=2' and not 'tp=2, pp=1, ep=1, replicas=1'",
        ),
        ("rules", ({"w": ray_streamer.Replicate()}, {"w": ray_streamer.Split(0)}), "other rules than rank 1"),
        ("dtype", (None, torch.bfloat16), "other dtype than rank 1, 'None' and not \"[('*', 'BF16')]\""),
        ("rename", ({"w": "v"}, None), "other rename than rank 1"),
        ("model_type", (None, "llama"), "other model_type than rank 1"),
    ],
)
def test_ranks_that_were_given_other_arguments_hold_no_model_together(
    argument: str, of_ranks: tuple[Any, Any], said: str, tmp_path: Path
) -> None:
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "model.safetensors")

    def load(rank: int) -> BaseException | None:
        arguments = {"tp": 2, "rules": {"w": ray_streamer.Replicate()}} | {argument: of_ranks[rank]}
        try:
            load_rank(str(tmp_path), **arguments, rank=rank, world_size=2, session=f"arguments-{tmp_path}")
        except ray_streamer.RayStreamerError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(load, range(2)))
    assert all(isinstance(error, ray_streamer.ClusterError) for error in errors)
    assert any(f"rank 0 was given {said}" in str(error) for error in errors)


def test_ranks_may_write_one_argument_in_several_ways(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    ways = [
        {"rules": {"w": ray_streamer.Split(0)}, "dtype": "bfloat16", "rename": {"w": "v"}},
        {"rules": iter([("w", ray_streamer.Split(0))]), "dtype": torch.bfloat16, "rename": [("w", "v")]},
    ]

    def load(rank: int) -> dict[str, torch.Tensor]:
        return load_rank(str(tmp_path), tp=2, **ways[rank], rank=rank, world_size=2, session=f"ways-{tmp_path}")

    with ThreadPoolExecutor(2) as pool:
        assert [tensors["v"].dtype for tensors in pool.map(load, range(2))] == [torch.bfloat16] * 2
