"""Meshes beyond tp: which stage and which group of experts holds a tensor, and that together they hold all of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from family_support.held import Held, boxes_of, resolve
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding import Mesh, ShardRules, Split, TensorSlice
from ray_streamer.sharding.experts import divide_experts
from ray_streamer.sharding.model_structure import ModelStructure
from ray_streamer.sharding.name_kinds import NameKinds
from ray_streamer.sharding.pipeline import divide_layers
from ray_streamer.testing.layouts import ModelLayout, TensorSpec, llama_layout, mixtral_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex

MIXTRAL = mixtral_layout(64, 3, 8, 2, 32, 101, experts=5)
LLAMA = llama_layout(64, 5, 8, 4, 32, 101)


def _index(layout: ModelLayout) -> CheckpointIndex:
    return header_only_index(layout.tensors, num_files=2, config=layout.config)


def _resolve(layout: ModelLayout, mesh: Mesh, **arguments: Any) -> tuple[CheckpointIndex, Held]:
    index = _index(layout)
    return index, resolve(index, ShardRules.for_config(layout.config), mesh, **arguments)


def _holders(index: CheckpointIndex, table: Held, name: str) -> list[int]:
    return [rank for rank in range(table.mesh.num_ranks) if table.slice_of(index.position(name), rank) is not None]


# From vLLM's own tests of its partition (tests/distributed/test_pipeline_partition.py), by pp_size.
@pytest.mark.parametrize(
    ("num_layers", "pp", "layers"),
    [(2, 2, (1, 1)), (3, 2, (2, 1)), (3, 3, (1, 1, 1)), (4, 3, (1, 2, 1)), (5, 3, (2, 2, 1)), (61, 2, (31, 30))],
)
def test_layers_are_divided_as_vllm_divides_them(num_layers: int, pp: int, layers: tuple[int, ...]) -> None:
    assert divide_layers(num_layers, pp) == layers


def test_each_stage_holds_its_layers_and_the_ends_what_belongs_to_them() -> None:
    index, table = _resolve(LLAMA, Mesh(tp=2, pp=2))
    stages = {0: [0, 1], 1: [2, 3]}
    for name in index.names:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        first = name == "model.embed_tokens.weight" or (layer is not None and layer < 3)
        assert _holders(index, table, name) == stages[0 if first else 1], name
    query = index.position("model.layers.4.self_attn.q_proj.weight")
    assert table.slice_of(query, 3) == TensorSlice.along((64, 64), 0, [range(32, 64)])


def test_a_tied_embedding_lies_on_both_ends() -> None:
    index, table = _resolve(llama_layout(64, 3, 8, 4, 32, 101, tied=True), Mesh(pp=3))
    assert _holders(index, table, "model.embed_tokens.weight") == [0, 2]
    assert _holders(index, table, "model.norm.weight") == [2]


def test_layers_of_stages_may_be_given() -> None:
    index, table = _resolve(LLAMA, Mesh(pp=2), stage_layers=(1, 4))
    held = [_holders(index, table, f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(5)]
    assert held == [[0], [1], [1], [1], [1]]


def test_drafts_follow_the_head_and_towers_stand_with_the_embeddings() -> None:
    llama = {spec.name: spec for spec in llama_layout(64, 2, 8, 4, 32, 101).tensors}
    mtp = [TensorSpec(name.replace(".1.", ".2."), *spec[1:]) for name, spec in llama.items() if ".layers.1." in name]
    config = llama_layout(64, 2, 8, 4, 32, 101).config | {
        "model_type": "glm4_moe",
        "num_nextn_predict_layers": 1,
        "n_routed_experts": 4,
    }
    index = header_only_index([*llama.values(), *mtp], num_files=1, config=config)
    rules = ShardRules.for_config(config, mtp=True)
    assert _holders(index, resolve(index, rules, Mesh(pp=2)), "model.layers.2.mlp.up_proj.weight") == [1]
    skipped = resolve(index, ShardRules.for_config(config), Mesh(pp=2))
    assert _holders(index, skipped, "model.layers.2.mlp.up_proj.weight") == []

    config = {"model_type": "gemma3", "text_config": LLAMA.config | {"head_dim": 8}}
    tower = TensorSpec("vision_tower.encoder.layers.4.fc.weight", "BF16", (4, 4))
    index = header_only_index([tower, *LLAMA.tensors], num_files=1, config=config)
    table = resolve(index, ShardRules.for_config(config), Mesh(pp=2))
    assert _holders(index, table, tower.name) == [0]


@pytest.mark.parametrize(
    ("pp", "layers", "message"),
    [
        pytest.param(6, None, "5 layers are too few for pp=6", id="too-few"),
        pytest.param(2, (2, 2), "stages of 2, 2 layers make 4; the model has 5", id="wrong-sum"),
        pytest.param(1, (4,), "stages of 4 layers make 4; the model has 5", id="wrong-number-of-one-stage"),
        pytest.param(2, (5, 0), "at least 1, got \\(5, 0\\)", id="empty-stage"),
    ],
)
def test_layers_that_do_not_divide_are_refused(pp: int, layers: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        _resolve(LLAMA, Mesh(pp=pp), stage_layers=layers)


def test_a_pipeline_knows_every_layer_or_nothing() -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config | {"num_hidden_layers": 7})
    with pytest.raises(ShardingError, match="no tensors in 2 of its 7 layers, such as layer 5"):
        resolve(index, ShardRules.for_config(index.config), Mesh(pp=2))
    index = header_only_index(LLAMA.tensors, num_files=1, config={"model_type": "unheard_of"})
    with pytest.raises(ShardingError, match=r"pp=2 and ep=1 need to know .* no preset for model type 'unheard_of'"):
        resolve(index, ShardRules({"*": Split(0)}), Mesh(pp=2))


def _with_mtp(num_layers: int) -> CheckpointIndex:
    """A Qwen3-Next with so many of its two layers, the last first, and an MTP layer that is counted from 0 again."""
    specs = [
        TensorSpec(f"{prefix}.mlp.experts.{expert}.up_proj.weight", "BF16", (4, 4))
        for prefix in ("mtp.layers.0", "model.layers.1", "model.layers.0")[: num_layers + 1]
        for expert in range(4)
    ]
    config = {"model_type": "qwen3_next", "num_hidden_layers": 2, "num_experts": 4}
    return header_only_index(specs, num_files=1, config=config)


def test_layers_of_multi_token_prediction_are_no_layers_of_a_pipeline() -> None:
    with pytest.raises(ShardingError, match="no tensors in 1 of its 2 layers, such as layer 0"):
        resolve(_with_mtp(1), ShardRules({"*": Split(0)}), Mesh(pp=2))
    index = _with_mtp(2)
    table = resolve(index, ShardRules({"*": Split(0)}), Mesh(pp=2))
    assert _holders(index, table, "mtp.layers.0.mlp.experts.0.up_proj.weight") == [1]


def test_experts_by_layer_do_not_move_those_of_multi_token_prediction() -> None:
    index = _with_mtp(2)
    table = resolve(index, ShardRules({"*": Split(0)}), Mesh(tp=2, ep=2), experts={0: [[3, 2], [1, 0]]})
    held = {
        prefix: [e for e in range(4) if 0 in _holders(index, table, f"{prefix}.0.mlp.experts.{e}.up_proj.weight")]
        for prefix in ("model.layers", "mtp.layers")
    }
    assert held == {"model.layers": [2, 3], "mtp.layers": [0, 1]}


def _experts_of(index: CheckpointIndex, table: Held, rank: int, layer: int = 0) -> list[int]:
    names = {expert: f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(5)}
    return [expert for expert, name in names.items() if table.slice_of(index.position(name), rank) is not None]


def test_ranks_hold_whole_experts_and_slices_of_the_rest() -> None:
    index, table = _resolve(MIXTRAL, Mesh(tp=2, ep=2))
    assert [_experts_of(index, table, rank) for rank in (0, 1)] == [[0, 1, 2], [3, 4]]
    down = index.position("model.layers.0.block_sparse_moe.experts.4.w2.weight")
    assert table.slice_of(down, 1) == TensorSlice.whole((64, 32))
    gate = index.position("model.layers.0.block_sparse_moe.gate.weight")
    assert table.slice_of(gate, 1) == TensorSlice.whole((5, 64))
    query = index.position("model.layers.0.self_attn.q_proj.weight")
    assert table.slice_of(query, 1) == TensorSlice.along((64, 64), 0, [range(32, 64)])


def test_experts_may_be_cut_inside_of_their_groups_and_spread_over_replicas() -> None:
    index, table = _resolve(MIXTRAL, Mesh(tp=4, ep=2, dp=2))
    assert [_experts_of(index, table, rank) for rank in range(8)] == [[0, 1, 2], [0, 1, 2], [3, 4], [3, 4]] * 2
    up = index.position("model.layers.0.block_sparse_moe.experts.4.w3.weight")
    assert table.slice_of(up, 7) == TensorSlice.along((32, 64), 0, [range(16, 32)])
    index, table = _resolve(MIXTRAL, Mesh(tp=1, dp=5, ep=5))
    assert [_experts_of(index, table, rank) for rank in range(5)] == [[0], [1], [2], [3], [4]]
    query = index.position("model.layers.0.self_attn.q_proj.weight")
    assert _holders(index, table, index.names[query]) == [0, 1, 2, 3, 4]


def test_experts_may_be_given_with_copies_and_by_layer() -> None:
    balanced = [[4, 0, 1], [2, 3, 4]]
    index, table = _resolve(MIXTRAL, Mesh(tp=2, ep=2), experts=balanced)
    assert [_experts_of(index, table, rank) for rank in (0, 1)] == [[0, 1, 4], [2, 3, 4]]
    index, table = _resolve(MIXTRAL, Mesh(tp=2, ep=2), experts={1: balanced})
    assert [_experts_of(index, table, rank, layer=1) for rank in (0, 1)] == [[0, 1, 4], [2, 3, 4]]
    assert [_experts_of(index, table, rank, layer=2) for rank in (0, 1)] == [[0, 1, 2], [3, 4]]


def test_stacked_experts_are_taken_row_by_row_with_their_scales() -> None:
    config = {"model_type": "llama4_text", "num_hidden_layers": 1, "num_local_experts": 4, "intermediate_size": 16}
    prefix = "model.layers.0.feed_forward.experts"
    stored = {
        f"{prefix}.gate_up_proj": ("F8_E4M3", (4, 8, 32)),
        f"{prefix}.gate_up_proj_scale": ("F32", (4, 1, 32)),
        f"{prefix}.down_proj": ("BF16", (4, 16, 8)),
    }
    index = header_only_index([TensorSpec(name, *spec) for name, spec in stored.items()], num_files=1, config=config)
    rules = ShardRules({"*.gate_up_proj": Split(2, parts=(16, 16)), "*.down_proj": Split(1)})
    table = resolve(index, rules, Mesh(tp=4, ep=2), experts=[[0, 1], [3, 2, 0]])
    whole = np.arange(4 * 16 * 8).reshape(4, 16, 8)
    down = table.slice_of(index.position(f"{prefix}.down_proj"), 3)
    np.testing.assert_array_equal(_cut(whole, down), whole[[3, 2, 0], 8:])
    for name, size in (("gate_up_proj", 8), ("gate_up_proj_scale", 1)):
        whole = np.arange(4 * size * 32).reshape(4, size, 32)
        part = table.slice_of(index.position(f"{prefix}.{name}"), 0)
        np.testing.assert_array_equal(_cut(whole, part), whole[:2][:, :, [*range(8), *range(16, 24)]])
    with pytest.raises(ShardingError, match=r"down_proj \[4, 16, 8\]: .* its rule divides them again"):
        resolve(index, ShardRules({"*.gate_up_proj": Split(2), "*.down_proj": Split(0)}), Mesh(tp=4, ep=2))


@pytest.mark.parametrize(
    ("layout", "ep", "experts", "message"),
    [
        pytest.param(LLAMA, 2, None, "ep=2 divides experts, and the model's config.json names none", id="no-experts"),
        pytest.param(MIXTRAL, 8, None, "5 experts are too few for ep=8", id="too-few"),
        pytest.param(MIXTRAL, 2, [[0, 1, 2, 3, 4]], "experts has 1 group for ep=2", id="wrong-number-of-groups"),
        pytest.param(MIXTRAL, 2, [[0, 1], [2, 4]], "leaves out 1 expert, such as 3", id="left-out"),
        pytest.param(MIXTRAL, 2, [[0, 1, 5], [2, 3, 4]], "group 0 has 5, which is none of the 5", id="unknown"),
        pytest.param(MIXTRAL, 2, [[0, 1, 0], [2, 3, 4]], "group 0 has an expert twice", id="twice"),
        pytest.param(MIXTRAL, 2, {9: [[0, 1], [2, 3, 4]]}, "names layer 9; the model has 3", id="unknown-layer"),
        pytest.param(MIXTRAL, 2, {0: [[0], [1]]}, r"experts\[0\] leaves out 3", id="left-out-of-a-layer"),
        pytest.param(MIXTRAL, 2, [0, 1], "one list of experts per group", id="no-lists"),
    ],
)
def test_experts_that_do_not_divide_are_refused(layout: ModelLayout, ep: int, experts: Any, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        _resolve(layout, Mesh(tp=8, ep=ep) if ep == 8 else Mesh(tp=2, ep=2), experts=experts)


def test_an_expert_that_config_does_not_count_is_refused() -> None:
    index = header_only_index(MIXTRAL.tensors, num_files=1, config=MIXTRAL.config | {"num_local_experts": 4})
    with pytest.raises(ShardingError, match=r"experts\.4\.\S+ is of expert 4; config.json names 4 experts"):
        resolve(index, ShardRules.for_config(index.config), Mesh(tp=2, ep=2))


def test_whole_experts_ask_less_of_tp_than_cut_ones() -> None:
    odd = mixtral_layout(64, 1, 8, 2, 33, 101, experts=4)
    with pytest.raises(ShardingError, match=r"w1.weight \[33, 64\] .*: dimension 0: 33 indices do not divide"):
        _resolve(odd, Mesh(tp=2))
    _resolve(odd, Mesh(tp=2, ep=2))
    with pytest.raises(ShardingError, match=r"over tp=3:(.|\n)*every tensor: 1, 2, 4, 8$"):
        _resolve(odd, Mesh(tp=3, ep=3))
    with pytest.raises(SettingsError):
        Mesh(tp=2, ep=3)


def _cut(whole: np.ndarray, part: TensorSlice | None) -> np.ndarray:
    assert part is not None
    result = np.full(part.shape, -1)
    for source, target in boxes_of(part):
        assert (result[target] == -1).all(), "two boxes land on one element"
        result[target] = whole[source]
    return result


@st.composite
def _meshes(draw) -> Mesh:
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    fitting = [ep for ep in range(1, 6) if tp % ep == 0 or (ep % tp == 0 and dp % (ep // tp) == 0)]
    return Mesh(tp=tp, pp=pp, dp=dp, ep=draw(st.sampled_from(fitting)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mesh=_meshes(), vocab=st.sampled_from([1, 3, 101]), tied=st.booleans(), kv_heads=st.sampled_from([1, 2, 8]))
def test_the_ranks_of_a_replica_hold_the_whole_model_between_them(
    mesh: Mesh, vocab: int, tied: bool, kv_heads: int
) -> None:
    layout = mixtral_layout(32, 3, 8, kv_heads, 16, vocab, experts=5)
    tensors = [spec for spec in layout.tensors if not (tied and spec.name == "lm_head.weight")]
    index, table = _resolve(ModelLayout(tensors, layout.config), mesh)
    experts = ModelStructure.of(layout.config).locate(NameKinds.of(index.names)).experts
    span = max(1, mesh.ep // mesh.tp)
    for tensor, name in enumerate(index.names):
        note(name)
        shape = index.shape_of(tensor)
        for first in range(0, mesh.dp, span):
            # Replicas that share the experts are whole together; in all but the experts each of them is.
            together = span if experts[tensor] >= 0 else 1
            ranks = [rank for rank in range(mesh.num_ranks) if first <= mesh.coordinate(rank)["dp"] < first + together]
            counts = np.zeros(shape, dtype=int)
            for rank in ranks:
                for source, _ in boxes_of(part) if (part := table.slice_of(tensor, rank)) is not None else ():
                    counts[source] += 1
            assert counts.all(), f"{name}: {(counts == 0).sum()} elements on no rank"
            _check_copies(name, counts, mesh, tied=tied, kv_heads=kv_heads)


def _check_copies(name: str, counts: np.ndarray, mesh: Mesh, *, tied: bool, kv_heads: int) -> None:
    """How often each element lies on the ranks of one replica."""
    copies = 1
    if name.endswith((".gate.weight", "norm.weight")):
        copies = mesh.tp
    elif ".k_proj" in name or ".v_proj" in name:
        copies = max(1, mesh.tp // kv_heads)
    elif "embed_tokens" in name and tied and mesh.pp > 1:
        copies = 2
    assert Counter(counts.ravel().tolist()).keys() == {copies}, name


def test_uneven_experts_go_to_the_first_groups() -> None:
    assert divide_experts(7, 3) == ((0, 1, 2), (3, 4), (5, 6))
