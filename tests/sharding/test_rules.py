from __future__ import annotations

import fnmatch
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding import Replicate, Rule, ShardRules, Skip, Split
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.sharding.globs import matches_any
from ray_streamer.sharding.name_kinds import NameKinds

if TYPE_CHECKING:
    from ray_streamer.sharding.placement import Placement

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2}


def test_the_first_rule_that_matches_decides() -> None:
    rules = ShardRules([("*.0.q_proj.weight", Skip()), ("*.q_proj.*", Split(0)), ("*", Replicate())])
    names = ("layers.0.q_proj.weight", "layers.1.q_proj.weight", "layers.10.q_proj.bias", "norm.weight")
    assert [rules.placement_of(name) for name in names] == [Skip(), Split(0), Split(0), Replicate()]


def test_names_without_a_rule_have_no_placement() -> None:
    rules = ShardRules({"*.q_proj.weight": Split(0)})
    assert rules.placement_of("layers.0.self_attn.q_proj.weight_scale_inv") is None
    assert rules.placement_of("layers.0.self_attn.Q_proj.weight") is None
    assert ShardRules().placement_of("norm.weight") is None


_NAMES = st.lists(st.sampled_from(["layers", "w1", "1w", "0", "1", "12", "127"]), min_size=1, max_size=4).map(".".join)


@st.composite
def names_and_globs(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Globs are names, some of whose letters are replaced by patterns, so that they nearly match."""
    names = draw(st.lists(_NAMES, min_size=1, max_size=6))
    globs: list[str] = []
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        start = draw(st.integers(0, len(name)))
        stop = draw(st.integers(start, len(name)))
        globs.append(name[:start] + draw(st.sampled_from(["", "*", "?", "[01]", "[!1]", "1", "*1*"])) + name[stop:])
    return names, [glob for glob in globs if glob]


@given(names_and_globs())
@example((["layers.12.w1", "layers.2.w1"], ["layers.1*"]))
@example((["layers.12.w1", "layers.2.w1"], ["layers.*2.w1"]))
@example((["layers.12.w1", "layers.2.w1"], ["layers.?.w1"]))
@example((["layers.1.w1", "layers.2.w1"], ["layers.[1].w1"]))
def test_matches_are_those_of_fnmatch(case: tuple[list[str], list[str]]) -> None:
    names, globs = case
    expected = [next((at for at, glob in enumerate(globs) if fnmatch.fnmatchcase(name, glob)), -1) for name in names]
    rules = ShardRules([(glob, Split(0)) for glob in globs])
    assert rules.first_matches(NameKinds.of(names)).tolist() == expected


@given(st.text("ab*", min_size=1, max_size=7), st.lists(st.text("ab\n", max_size=7), max_size=8))
@example("ab*ba", ["aba", "abba", "abbba"])
@example("*ab*ab*", ["ab", "aab", "abab", "ab\nab"])
@example("a**b", ["ab", "a", "acb"])
def test_pieces_of_globs_neither_overlap_nor_change_places(glob: str, names: list[str]) -> None:
    assert matches_any([glob], names) == [fnmatch.fnmatchcase(name, glob) for name in names]


def test_sums_keep_the_order_and_what_is_optional() -> None:
    rules = ShardRules({"a": Split(0)}) + ShardRules({"b": Split(1)}, optional=True)
    assert list(rules) == [Rule("a", Split(0)), Rule("b", Split(1), optional=True)]
    assert ShardRules(rules) == rules == pickle.loads(pickle.dumps(rules))


def test_given_rules_come_before_the_preset() -> None:
    rules = ShardRules.for_config(LLAMA, first={"*.1.self_attn.q_proj.weight": Replicate()})
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1, 11)]
    assert [rules.placement_of(name) for name in names] == [Split(0, heads=8), Replicate(), Split(0, heads=8)]
    assert [rule.glob for rule in rules if not rule.optional] == ["*.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize("config", [None, {}, {"model_type": "grok"}, {"model_type": ["llama"]}])
def test_given_rules_stand_alone_when_the_family_is_unknown(
    config: dict[str, object] | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert ShardRules.for_config(config, first={"*": Split(0)}) == ShardRules({"*": Split(0)})
    assert "the given rules stand alone" in caplog.text


@pytest.mark.parametrize("first", [{}, {"*": Split(0)}])
def test_a_layout_that_is_none_is_refused(first: dict[str, Placement]) -> None:
    with pytest.raises(SettingsError, match="layout is one of generic, transformers, vllm, not 'megatron'"):
        ShardRules.for_config(LLAMA, first=first, layout="megatron")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [None, {}, {"model_type": "grok"}, {"model_type": ["llama"]}])
def test_an_unknown_family_is_refused_with_the_known_ones(config: dict[str, object] | None) -> None:
    shown = repr((config or {}).get("model_type"))
    with pytest.raises(ShardingError) as raised:
        ShardRules.for_config(config)
    assert shown in str(raised.value)
    assert f"known are {', '.join(sorted(FAMILIES))}, and as one of these" in str(raised.value)
    assert 'rules={"*.q_proj.weight": Split(0)' in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "llama model needs a number for num_attention_heads, got None"),
        (LLAMA | {"num_key_value_heads": "2"}, "number for num_key_value_heads, got '2'"),
        (LLAMA | {"num_attention_heads": 0}, "number for num_attention_heads, got 0"),
        (LLAMA | {"model_type": "phi3"}, "number for hidden_size, got None"),
        (
            LLAMA | {"model_type": "gemma3", "text_config": [1]},
            r"gemma3 model needs an object for text_config, got \[1\]",
        ),
        (LLAMA | {"model_type": "gemma4_text", "per_layer_config": 5}, "needs an object for per_layer_config, got 5"),
        (LLAMA | {"model_type": "gemma4_text", "per_layer_config": {"3": 5}}, "needs an object for layer 3, got 5"),
        (
            LLAMA | {"model_type": "gemma4_text", "per_layer_config": {"3": {"num_key_value_heads": "8"}}},
            "number for num_key_value_heads of layer 3, got '8'",
        ),
        (LLAMA | {"model_type": "gemma4_text", "per_layer_config": {"x": {}}}, r"needs numbers of layers, got \['x'\]"),
        (LLAMA | {"model_type": "deepseek_v3"}, "number for num_hidden_layers, got None"),
    ],
)
def test_missing_sizes_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        ShardRules.for_config(config)


PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
    "model.layers.*.feed_forward.experts.gate_up_proj": "packed_rowwise",
    "model.layers.*.feed_forward.experts.down_proj": "colwise",
    "lm_head": "colwise_gather_output",
}


@pytest.mark.parametrize(
    ("name", "shape", "last"),
    [
        ("model.embed_tokens.weight", (10, 8), (1, 8)),
        ("model.layers.0.self_attn.q_proj.weight", (10, 8), (1, 8)),
        ("model.layers.0.self_attn.q_proj.bias", (10,), (1,)),
        ("model.layers.0.self_attn.o_proj.weight", (8, 10), (8, 1)),
        ("model.layers.0.self_attn.o_proj.bias", (8,), (8,)),
        ("model.layers.0.self_attn.q_norm.weight", (4,), (4,)),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 20, 8), (2, 2, 8)),
        ("model.layers.0.mlp.experts.down_proj", (2, 8, 10), (2, 8, 1)),
        ("model.layers.0.mlp.experts.1.gate_proj.weight", (10, 8), (1, 8)),
        ("model.layers.0.mlp.experts.1.up_proj.weight", (10, 8), (1, 8)),
        ("model.layers.0.mlp.experts.1.down_proj.weight", (8, 10), (8, 1)),
        ("model.layers.0.feed_forward.experts.gate_up_proj", (2, 8, 20), (2, 8, 2)),
        ("model.layers.0.feed_forward.experts.down_proj", (2, 10, 8), (2, 1, 8)),
        ("language_model.model.layers.0.self_attn.q_proj.weight", (10, 8), (1, 8)),
        ("lm_head.weight", (10, 8), (1, 8)),
    ],
)
def test_styles_of_a_plan_of_transformers(name: str, shape: tuple[int, ...], last: tuple[int, ...]) -> None:
    placement = ShardRules.from_tp_plan(PLAN).placement_of(name)
    assert placement is not None
    assert placement.refusal(shape, 4) is None
    # Of 10 indices the four ranks hold 3, 3, 3 and 1.
    part = placement.share_of(shape, tp_index=3, tp=4)
    assert part is not None
    assert part.shape == last


def test_a_plan_leaves_open_what_it_does_not_name() -> None:
    rules = ShardRules.from_tp_plan(PLAN)
    assert rules.placement_of("model.layers.0.mlp.gate.weight") is None
    assert rules.placement_of("model.layers.0.mlp.experts.1.scale_proj.weight") is None
    assert all(rule.optional for rule in rules)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        pytest.param({}, "a plan maps names of modules to styles", id="empty"),
        pytest.param(None, "got None", id="none"),
        pytest.param(["colwise"], r"got \['colwise'\]", id="list"),
        pytest.param(
            {"a": "colwise", "b": "sideways"}, "unknown styles .* b: 'sideways'; known are all_reduce", id="style"
        ),
    ],
)
def test_plans_that_are_none_are_refused(plan: Any, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        ShardRules.from_tp_plan(plan)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        pytest.param("*.q_proj.weight", "mapping of glob to placement", id="text"),
        pytest.param(3, "mapping of glob to placement", id="number"),
        pytest.param(["*.q_proj.weight"], r"a rule is a pair .* got '\*.q_proj.weight'", id="glob-without-placement"),
        pytest.param([("a", Split(0), 1)], "a rule is a pair", id="triple"),
        pytest.param([(Split(0), "a")], r"starts with a glob of tensor names, got Split\(dim=0", id="swapped"),
        pytest.param({"": Split(0)}, "starts with a glob", id="empty-glob"),
        pytest.param({"a": 0}, "rule 'a' needs a placement such as .* got 0", id="dim-for-placement"),
        pytest.param({"a": Split}, "rule 'a' needs a placement", id="class-for-placement"),
    ],
)
def test_wrongly_typed_rules_are_named(rules: object, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        ShardRules(rules)  # type: ignore[arg-type]
