"""Numbers of heads that divide and do not fit: refused where ranks would get other parts than with the right ones, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from family_support.held import resolve

from ray_streamer.errors import CheckpointError
from ray_streamer.sharding import Mesh, ShardRules, Split

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex

IndexOf = Callable[..., Any]

# Eight heads of eight, four key-value heads.
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
SHAPES = {
    "q_proj.weight": (64, 64),
    "k_proj.weight": (32, 64),
    "v_proj.weight": (32, 64),
    "o_proj.weight": (64, 64),
}


def _index(index_of: IndexOf, **changed: tuple[int, ...]) -> CheckpointIndex:
    shapes = SHAPES | {f"{name}.weight": shape for name, shape in changed.items()}
    return index_of({f"model.layers.0.self_attn.{name}": shape for name, shape in shapes.items()})


def _rules(**sizes: Any) -> ShardRules:
    return ShardRules.for_config(LLAMA | sizes)


@pytest.mark.parametrize(
    ("sizes", "tp"),
    [
        pytest.param({"num_key_value_heads": 2}, 4, id="too-few-to-share"),
        pytest.param({"num_key_value_heads": 1}, 2, id="one"),
        pytest.param({"num_key_value_heads": 8}, 8, id="too-many"),
        pytest.param({}, 8, id="unsaid"),
        pytest.param({"num_key_value_heads": 4, "num_attention_heads": 16}, 16, id="other-heads"),
        pytest.param({"num_key_value_heads": 16, "num_attention_heads": 16}, 16, id="both"),
    ],
)
def test_heads_that_cut_elsewhere_are_refused(index_of: IndexOf, sizes: dict[str, Any], tp: int) -> None:
    with pytest.raises(
        CheckpointError, match=r"do not fit .*o_proj.* 64 inputs .*v_proj.* 32 outputs: correct"
    ) as caught:
        resolve(_index(index_of), _rules(**sizes), Mesh(tp=tp))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "tp"),
    [
        pytest.param({"num_key_value_heads": 4}, 8, id="right"),
        pytest.param({"num_key_value_heads": 2}, 2, id="alike"),
        pytest.param({"num_key_value_heads": 1}, 1, id="whole"),
        pytest.param({"num_key_value_heads": 8, "num_attention_heads": 16}, 16, id="smaller-heads"),
    ],
)
def test_heads_that_cut_alike_are_no_matter(index_of: IndexOf, sizes: dict[str, Any], tp: int) -> None:
    resolve(_index(index_of), _rules(**sizes), Mesh(tp=tp))


def test_queries_and_keys_may_be_larger_than_values(index_of: IndexOf) -> None:
    index = _index(index_of, q_proj=(192, 64), k_proj=(48, 64))
    resolve(index, _rules(num_key_value_heads=4), Mesh(tp=4))


def test_heads_of_the_callers_rules_are_judged_and_other_rules_are_not(index_of: IndexOf) -> None:
    index, sizes = _index(index_of), _rules(num_key_value_heads=4)
    resolve(index, ShardRules({"*.v_proj.weight": Split(0)}) + sizes, Mesh(tp=8))
    with pytest.raises(CheckpointError, match="2 key-value heads do not fit"):
        resolve(index, ShardRules({"*.v_proj.weight": Split(0, kv_heads=2)}) + sizes, Mesh(tp=4))
