"""Pipeline stages, whole experts and replicas on a real local Ray, against safetensors' own slices."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import safetensors
from api_support import oracle, rank_tasks

import ray_streamer
from ray_streamer.errors import DeviceError, SettingsError
from ray_streamer.testing.checkpoints import mixtral_layout, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from api_support.processes import RankProcesses

    from ray_streamer import Mesh, RankContext

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LAYERS, EXPERTS = 3, 4
LAYOUT = mixtral_layout(64, LAYERS, 8, 2, 96, 501, experts=EXPERTS)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixtral"), LAYOUT.tensors, num_files=3, config=LAYOUT.config)


def share_of(rank: int, mesh: Mesh) -> Callable[[str], tuple[int, int] | None]:
    """What a rank holds of each tensor of a Mixtral, with the first stage's layers before layer 2."""
    tp_index, stage = rank % mesh.tp, rank // mesh.tp % mesh.pp

    def share(name: str) -> tuple[int, int] | None:
        layer, expert = (re.search(rf"\.{part}\.(\d+)\.", name) for part in ("layers", "experts"))
        if mesh.pp > 1:
            belongs = int(int(layer[1]) >= 2) if layer else int("embed" not in name)
            if belongs != stage:
                return None
        if expert and mesh.ep > 1:
            group = rank % mesh.tp if mesh.ep == mesh.tp else rank
            return (0, 1) if int(expert[1]) * mesh.ep // EXPERTS == group else None
        return tp_index, mesh.tp

    return share


def find_faults(context: RankContext, folder: str) -> list[str]:
    return oracle.faults(context.tensors, folder, share_of=share_of(context.rank, context.mesh))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"tp": 2, "pp": (2, 1), "ep": True}, id="stages-of-whole-experts"),
        pytest.param({"tp": 1, "ep": 4, "replicas": 4}, id="experts-over-replicas", marks=pytest.mark.slow),
    ],
)
def test_every_rank_holds_its_stage_and_its_experts(local_ray: None, mixtral: Path, arguments: dict[str, Any]) -> None:
    with ray_streamer.load_sharded(str(mixtral), **arguments, memory_limit="1MiB") as model:
        assert model.run(find_faults, str(mixtral)) == [[]] * 4
        report = model.stats()
        assert report.mesh == {"tp": model.mesh.tp, "pp": model.mesh.pp, "dp": model.mesh.dp, "ep": model.mesh.ep}
        # On one node, stages, experts and replicas all share what is read.
        assert model.plan.summary().amplification == 1.0
        whole = model.gather("model.layers.2.block_sparse_moe.experts.3.w2.weight")
        assert tuple(whole.shape) == (64, 96)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "w13": ("w1", "w3")}
RENAMED = [(r"^model\.", ""), (r"block_sparse_moe", "moe")]


def find_fused_faults(context: RankContext, folder: str) -> list[str]:
    """Wrong, missing or superfluous results of a load with `FUSED` and `RENAMED`."""
    import torch

    expected: dict[str, Any] = {}
    parts: dict[str, dict[int, Any]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                part = oracle.expected_slice(view, name, tp_index=context.rank, tp=context.mesh.tp, kv_heads=2)
                module = name.split(".")[-2]
                fused = next((fused for fused, modules in FUSED.items() if module in modules), None)
                new = name.replace("model.", "", 1) if name.startswith("model.") else name
                new = new.replace("block_sparse_moe", "moe")
                if fused is None:
                    expected[new] = part
                else:
                    parts.setdefault(new.replace(module, fused), {})[FUSED[fused].index(module)] = part
    expected |= {name: torch.cat([members[at] for at in sorted(members)]) for name, members in parts.items()}
    wrong = [name for name, tensor in expected.items() if not oracle.is_equal(context.tensors.get(name), tensor)]
    return wrong + sorted(context.tensors.keys() - expected.keys())


def test_results_are_fused_and_renamed_on_their_way_in(local_ray: None, mixtral: Path) -> None:
    with ray_streamer.load_sharded(str(mixtral), 2, fuse=FUSED, rename=RENAMED, memory_limit="1MiB") as model:
        assert model.run(find_fused_faults, str(mixtral)) == [[], []]
        name = "model.layers.1.self_attn.k_proj.weight"
        with safetensors.safe_open(
            next(path for path in mixtral.glob("*.safetensors") if holds(path, name)), "pt"
        ) as file:
            assert oracle.is_equal(model.gather(name), file.get_tensor(name))
        model.restart(1)
        assert model.run(find_fused_faults, str(mixtral)) == [[], []]


def holds(path: Path, name: str) -> bool:
    with safetensors.safe_open(path, framework="pt") as file:
        return name in file.keys()  # noqa: SIM118 - not a mapping


def test_fused_results_stream_complete_and_land_in_memory_of_the_caller(mixtral: Path) -> None:
    import torch

    name = "model.layers.0.self_attn.qkv_proj.weight"
    mine = torch.zeros(96, 64, dtype=torch.bfloat16)
    arguments = {"fuse": True, "settings": ray_streamer.Settings(page_cache="off", memory_limit=1 << 20)}
    streamed = dict(ray_streamer.stream_rank(str(mixtral), out={name: mine}, **arguments))
    assert streamed[name] is mine
    assert len(streamed) == len(LAYOUT.tensors) - 2 * LAYERS
    plain = ray_streamer.load_rank(str(mixtral))
    parts = [plain[name.replace("qkv_proj", f"{part}_proj")] for part in "qkv"]
    assert oracle.is_equal(mine, torch.cat(parts))
    cast = ray_streamer.load_rank(str(mixtral), dtype={"*.q_proj.*": torch.float64, "*": "float32"})
    assert {tensor.dtype for tensor in cast.values()} == {torch.float32, torch.float64}
    assert all(torch.equal(cast[name].isnan(), plain[name].isnan()) for name in plain)
    assert all(torch.equal(cast[name].nan_to_num().float(), plain[name].float().nan_to_num()) for name in plain)
    with pytest.raises(DeviceError, match=r"out names tensors that rank 0 does not hold: .*q_proj"):
        ray_streamer.load_rank(str(mixtral), out={name.replace("qkv", "q"): mine}, **arguments)


def test_ranks_of_the_caller_are_stages(pair: RankProcesses, mixtral: Path) -> None:
    common = {"uri": str(mixtral), "world_size": 2, "session": "stages"}
    first, last = pair.run(rank_tasks.names_of_stage, [{"rank": rank, **common} for rank in range(2)])
    assert sorted([*first, *last]) == sorted(spec.name for spec in LAYOUT.tensors)
    assert "model.embed_tokens.weight" in first
    assert {"lm_head.weight", "model.norm.weight"} <= set(last)


def test_stages_that_do_not_divide_the_ranks_are_refused(mixtral: Path) -> None:
    with pytest.raises(SettingsError, match="pp=2 does not divide the 3 ranks"):
        ray_streamer.load_rank(str(mixtral), rank=0, world_size=3, session="s", pp=2)
    with pytest.raises(SettingsError, match="tp=2 and pp=2 does not divide the 2 ranks"):
        ray_streamer.load_rank(str(mixtral), rank=0, world_size=2, session="s", tp=2, pp=2)
    with pytest.raises(SettingsError, match="pp is a number of stages, or the number of layers of each"):
        ray_streamer.plan(str(mixtral), pp="2")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="with slices, which say all of it, experts and layers"):
        ray_streamer.plan(str(mixtral), pp=(1, 2), slices=lambda index, mesh: None)  # type: ignore[arg-type]
