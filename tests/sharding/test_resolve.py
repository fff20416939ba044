from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from family_support.held import resolve

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding import (
    Mesh,
    Part,
    Placement,
    Replicate,
    Rule,
    RuleSlices,
    ShardRules,
    Skip,
    Split,
    SplitVocabulary,
    TensorSlice,
    legal_tp,
)

IndexOf = Callable[..., CheckpointIndex]
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
}


@pytest.fixture(scope="module")
def llama(index_of: IndexOf) -> CheckpointIndex:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 4096), "model.norm.weight": (4096,)}
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (4096, 4096) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (1024, 4096) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (4096, 14336), f"{prefix}input_layernorm.weight": (4096,)}
    return index_of(shapes, dtype="BF16", config=LLAMA_8B)


def test_every_replica_holds_the_same_as_the_first(index_of: IndexOf) -> None:
    index = index_of({"a": (8, 2), "b": (8, 2), "norm": (8,)})
    table = resolve(index, ShardRules({"a": Split(0), "b": Skip()}), Mesh(tp=2, dp=3))
    halves = [TensorSlice.along((8, 2), 0, [range(4 * half, 4 * half + 4)]) for half in range(2)]
    assert [table.slice_of(0, rank) for rank in range(6)] == halves * 3
    assert [table.slice_of(1, rank) for rank in range(6)] == [None] * 6
    assert [table.slice_of(2, rank) for rank in range(6)] == [TensorSlice.whole((8,))] * 6


def test_alike_answers_are_kept_once(llama: CheckpointIndex) -> None:
    table = resolve(llama, ShardRules.for_config(llama.config), Mesh(tp=8, dp=2))
    assert len(table.groups.groups) == 9
    assert len(table.groups.ids) == len(llama)
    down = llama.position("model.layers.31.mlp.down_proj.weight")
    assert table.slice_of(down, 11) == TensorSlice.along((4096, 14336), 1, [range(3 * 1792, 4 * 1792)])


def test_an_empty_checkpoint_has_no_slices(index_of: IndexOf) -> None:
    assert not resolve(index_of({}), ShardRules(), Mesh(tp=2)).groups.groups
    assert len(RuleSlices(rules=ShardRules({"*": Split(0)}, optional=True))(index_of({}), 0)) == 0


def test_shapes_that_differ_in_padding_only_are_kept_apart(index_of: IndexOf) -> None:
    index = index_of({"a": (4,), "b": (4, 1), "c": (4, 1, 1), "d": ()})
    table = resolve(index, ShardRules(), Mesh(tp=2), unmatched="replicate")
    shapes = [table.slice_of(tensor, 1).shape for tensor in range(4)]  # type: ignore[union-attr]
    assert shapes == [(4,), (4, 1), (4, 1, 1), ()]


def test_tensors_without_a_rule_are_an_error_from_two_dimensions_on(index_of: IndexOf) -> None:
    shapes = {f"layers.{layer}.mixer.weight": (4, 4) for layer in range(12)} | {"scale": (), "norm": (4,)}
    with pytest.raises(ShardingError) as raised:
        resolve(index_of(shapes), ShardRules(), Mesh(tp=2))
    message = str(raised.value)
    assert "12 tensors of memory://model" in message
    assert "layers.0.mixer.weight [4, 4], layers.1.mixer.weight [4, 4]" in message
    assert "layers.7.mixer.weight [4, 4] and 4 more" in message
    assert 'rules={"layers.*.mixer.weight": Split(0)}' in message
    assert 'unmatched="replicate"' in message
    assert "norm" not in message
    table = resolve(index_of(shapes), ShardRules(), Mesh(tp=2), unmatched="replicate")
    assert table.slice_of(0, 1) == TensorSlice.whole((4, 4))


def test_the_example_rule_of_the_error_works(index_of: IndexOf) -> None:
    index = index_of({"layers.3.experts.17.weight": (4, 4), "layers.4.experts.2.weight": (4, 4)})
    with pytest.raises(ShardingError, match=r'\{"layers\.\*\.experts\.\*\.weight": Split\(0\)\}'):
        resolve(index, ShardRules(), Mesh(tp=2))
    resolve(index, ShardRules({"layers.*.experts.*.weight": Split(0)}), Mesh(tp=2))


def test_a_rule_that_places_nothing_is_an_error_unless_optional(index_of: IndexOf) -> None:
    index = index_of({"layers.0.q_proj.weight": (4, 4)})
    typing_error, shadowed = ("*.q_porj.weight", Split(1)), ("layers.0.*", Split(1))
    rules = ShardRules([("*.q_proj.weight", Split(0)), typing_error, shadowed])
    with pytest.raises(ShardingError) as raised:
        resolve(index, rules, Mesh(tp=2))
    message = str(raised.value)
    assert "2 rules place no tensor of memory://model: '*.q_porj.weight', 'layers.0.*'. No name" in message
    assert "'*.q_proj.weight'" not in message
    lenient = ShardRules([("*.q_proj.weight", Split(0)), Rule(*typing_error, optional=True)])
    resolve(index, lenient + ShardRules([shadowed], optional=True), Mesh(tp=2))


def test_both_troubles_with_rules_are_told_at_once(index_of: IndexOf) -> None:
    with pytest.raises(ShardingError) as raised:
        resolve(index_of({"q_proj": (4, 4)}), ShardRules({"q_porj": Split(0)}), Mesh(tp=2))
    assert "1 rule places no tensor" in str(raised.value)
    assert "1 tensor of memory://model has two or more dimensions and no rule" in str(raised.value)


def test_an_unknown_word_for_unmatched_is_refused(index_of: IndexOf) -> None:
    with pytest.raises(SettingsError, match="unmatched is one of error, replicate, not 'eror'"):
        resolve(index_of({"a": (2, 2)}), ShardRules({"a": Split(0)}), Mesh(), unmatched="eror")  # type: ignore[arg-type]


def test_impossible_splits_are_told_together_with_the_sizes_that_work(llama: CheckpointIndex) -> None:
    with pytest.raises(ShardingError) as raised:
        resolve(llama, ShardRules.for_config(llama.config), Mesh(tp=6))
    message = str(raised.value)
    # 7 split tensors in each of 32 layers; the vocabulary and the norms never mind.
    assert message.startswith("224 tensors of memory://model cannot be split over tp=6:")
    assert "model.layers.0.self_attn.q_proj.weight [4096, 4096]" in message
    assert "dimension 0: 32 heads do not divide among tp=6" in message
    assert "dimension 0: 8 key-value heads neither divide among nor share out over tp=6" in message
    assert "dimension 1: 14336 indices do not divide among tp=6" in message
    assert message.endswith("tp that works for every tensor: 1, 2, 4, 8, 16, 32")
    assert "q_proj.weight [4096, 4096] and 31 alike: dimension 0: 32 heads" in message


def test_legal_tp_is_exactly_what_resolves(llama: CheckpointIndex) -> None:
    rules = ShardRules.for_config(llama.config)
    resolves: list[int] = []
    for tp in range(1, 40):
        try:
            resolve(llama, rules, Mesh(tp=tp))
        except ShardingError:
            continue
        resolves.append(tp)
    assert legal_tp(llama, rules) == tuple(resolves) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("placement", "legal"),
    [
        pytest.param(Split(0, heads=12), (1, 2, 3, 4, 6, 12), id="heads-end-at-their-number"),
        pytest.param(Split(0, parts=(Part(12, heads=4), Part(12, kv_heads=2))), (1, 2, 4), id="parts-agree"),
        pytest.param(Split(0, heads=5), (), id="no-size-works"),
        pytest.param(SplitVocabulary(), tuple(range(1, 129)), id="vocabulary-takes-any"),
    ],
)
def test_legal_tp_of_one_placement(index_of: IndexOf, placement: Placement, legal: tuple[int, ...]) -> None:
    index = index_of({"w": (24, 2)})
    assert legal_tp(index, ShardRules({"w": placement})) == legal
    if not legal:
        with pytest.raises(ShardingError, match="no tp works with these rules"):
            resolve(index, ShardRules({"w": placement}), Mesh(tp=1))


@pytest.mark.parametrize(
    ("dtype", "placement", "shape", "tp", "legal"),
    [
        pytest.param("F4", Split(1), (2, 12), 4, (1, 2, 3, 6), id="half-bytes"),
        pytest.param("F4", Split(-1, parts=(4, 8)), (2, 12), 4, (1, 2), id="half-bytes-in-parts"),
        pytest.param("F4", SplitVocabulary(1), (2, 10), 2, None, id="half-bytes-uneven"),
        pytest.param("F6_E2M3", Split(1), (2, 24), 4, (1, 2, 3, 6), id="three-quarter-bytes"),
        pytest.param("F4", Replicate(), (4, 3), 1, (), id="rows-of-broken-bytes"),
    ],
)
def test_packed_dtypes_are_cut_at_whole_bytes(
    index_of: IndexOf, dtype: str, placement: Placement, shape: tuple[int, ...], tp: int, legal: tuple[int, ...] | None
) -> None:
    index = index_of({"layers.0.w": shape}, dtype=dtype)
    rules = ShardRules({"layers.0.w": placement})
    with pytest.raises(ShardingError, match=rf"layers.0.w \[.*inside a byte of packed {dtype}"):
        resolve(index, rules, Mesh(tp=tp))
    if legal is not None:
        assert legal_tp(index, rules) == legal


@pytest.mark.parametrize(("dtype", "dim"), [("F4", 0), ("F4", 1), ("F6_E3M2", 1), ("F8_E4M3", 1)])
def test_packed_dtypes_are_split_where_bytes_are_whole(index_of: IndexOf, dtype: str, dim: int) -> None:
    table = resolve(index_of({"w": (8, 8)}, dtype=dtype), ShardRules({"w": Split(dim)}), Mesh(tp=2))
    assert table.slice_of(0, 1) == TensorSlice.along((8, 8), dim, [range(4, 8)])


def _deepseek_names() -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(61):
        for expert in range(256 if layer >= 3 else 0):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for name, shape in {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}.items():
                yield f"{prefix}{name}_proj.weight", shape
                yield f"{prefix}{name}_proj.weight_scale_inv", (shape[0] // 128, shape[1] // 128)
        yield f"model.layers.{layer}.self_attn.o_proj.weight", (7168, 16384)


@pytest.mark.parametrize(
    "numbered", [{}, {"*.layers.3.mlp.experts.*.gate_proj.weight": Replicate()}], ids=["by-kind", "by-name-too"]
)
def test_ninety_thousand_tensors_cost_no_more_than_their_kinds(
    index_of: IndexOf, numbered: dict[str, Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = dict(_deepseek_names())
    index = index_of(shapes)
    general: dict[str, Placement] = {"*.o_proj.weight": Split(1)}
    general |= {f"*.{name}_proj.weight{scale}": Split(0) for name in ("gate", "up") for scale in ("", "_scale_inv")}
    general |= {f"*.down_proj.weight{scale}": Split(1) for scale in ("", "_scale_inv")}
    rules = ShardRules({**numbered, **general})
    calls: Counter[str] = Counter()
    cut = Split.share_of

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls["share_of"] += 1
        return cut(*arguments, **keywords)

    monkeypatch.setattr(Split, "share_of", counted)
    source = RuleSlices(mesh=Mesh(tp=8, dp=2), rules=rules)
    slices = [source(index, rank) for rank in range(16)]
    assert len(shapes) > 89_000
    assert {len(held.patterns) for held in slices} == {5 + len(numbered)}
    # A slice for each kind of tensor and rank, asked for a few times; not one for each tensor.
    assert 0 < calls["share_of"] <= 6 * 8 * (7 + len(numbered))
