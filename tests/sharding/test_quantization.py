"""Quantized weights: what a rank's parts dequantize to is the rank's slice of what the whole checkpoint dequantizes to.

The dequantizers are written here, from the formats' descriptions, and know nothing of ranks: they see stored tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from family_support.held import boxes_of, resolve

from ray_streamer.errors import ShardingError
from ray_streamer.sharding import (
    Mesh,
    Part,
    Placement,
    Replicate,
    RuleSlices,
    ShardRules,
    Skip,
    Split,
    TensorSlice,
    legal_tp,
)
from ray_streamer.testing.layouts import TensorSpec
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.checkpoint.index import CheckpointIndex

Parts = dict[str, np.ndarray]
NUMPY = {"U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "I32": np.int32, "F32": np.float32, "BF16": np.float32}


def _words(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned elements of `bits` along the last dimension of 32-bit words, lowest first; they may straddle words."""
    as_bits = np.unpackbits(np.ascontiguousarray(packed, "<u4").view(np.uint8), axis=-1, bitorder="little")
    elements = as_bits.reshape(*packed.shape[:-1], -1, bits)
    return (elements << np.arange(bits)).sum(axis=-1).astype(np.float64)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float64)


def _spread(scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, ...]) -> np.ndarray:
    """One scale for each element."""
    for dim, elements in enumerate(block):
        scales = np.repeat(scales, elements, axis=dim).take(range(shape[dim]), axis=dim)
    return scales.astype(np.float64)


def _fp8_blocks(parts: Parts) -> np.ndarray:
    weight = parts["m.weight"]
    return weight * _spread(parts["m.weight_scale_inv"], weight.shape, (128, 128))


def _per_channel(parts: Parts) -> np.ndarray:
    return parts["m.weight"] * parts["m.weight_scale"].reshape(-1, 1).astype(np.float64)


def _per_tensor(parts: Parts) -> np.ndarray:
    return parts["m.weight"] * parts["m.weight_scale"].astype(np.float64) * parts["m.input_scale"]


def _int8(parts: Parts) -> np.ndarray:
    return parts["m.weight"] * parts["m.SCB"][:, None].astype(np.float64)


def _gptq(bits: int, group: int) -> Callable[[Parts], np.ndarray]:
    def dequantize(parts: Parts) -> np.ndarray:
        elements, zeros = _words(parts["m.qweight"].T, bits), _words(parts["m.qzeros"], bits).T
        # In order: the groups that a rank holds are those of its own inputs.
        scales = _spread(parts["m.scales"].T, elements.shape, (1, group))
        assert parts["m.g_idx"].shape == elements.shape[1:]
        return (elements - _spread(zeros, elements.shape, (1, group))) * scales

    return dequantize


def _gptq_in_activation_order(parts: Parts) -> np.ndarray:
    groups = parts["m.g_idx"] % parts["m.scales"].shape[0]
    elements = _words(parts["m.qweight"].T, 4)
    return (elements - _words(parts["m.qzeros"], 4).T[:, groups]) * parts["m.scales"].T[:, groups]


def _awq(parts: Parts) -> np.ndarray:
    elements = _words(parts["m.qweight"], 4).T
    spread = [_spread(part, elements.shape, (1, 128)) for part in (_words(parts["m.qzeros"], 4).T, parts["m.scales"].T)]
    return (elements - spread[0]) * spread[1]


def _compressed_tensors(parts: Parts) -> np.ndarray:
    elements = _words(parts["m.weight_packed"], 4)
    zeros = _words(parts["m.weight_zero_point"].T, 4).T
    spread = [_spread(part, elements.shape, (1, 32)) for part in (zeros, parts["m.weight_scale"])]
    assert parts["m.weight_shape"].shape == (2,)
    return (elements - spread[0]) * spread[1]


def _nvfp4(parts: Parts) -> np.ndarray:
    elements = _nibbles(parts["m.weight"])
    return elements * _spread(parts["m.weight_scale"], elements.shape, (1, 16)) * parts["m.weight_scale_2"]


def _mxfp8(parts: Parts) -> np.ndarray:
    return parts["m.weight"] * _spread(parts["m.weight_scale"], parts["m.weight"].shape, (1, 32))


def _mxfp4_experts(parts: Parts) -> np.ndarray:
    blocks = parts["experts.w_blocks"]
    elements = _nibbles(blocks) * parts["experts.w_scales"][..., None].astype(np.float64)
    return elements.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)


@dataclass(frozen=True)
class Format:
    """A quantized weight of (outputs, inputs), or of (experts, inputs, outputs), and how it is read."""

    weight: str
    shape: tuple[int, ...]
    stored: dict[str, tuple[str, tuple[int, ...]]]
    dequantize: Callable[[Parts], np.ndarray]
    config: dict[str, Any]

    @property
    def index(self) -> CheckpointIndex:
        specs = [TensorSpec(name, *spec) for name, spec in self.stored.items()]
        return header_only_index(specs, num_files=1, config={"quantization_config": self.config})

    def contents(self) -> Parts:
        random = np.random.default_rng(0)
        return {
            name: random.integers(0, 120, shape).astype(NUMPY[dtype])
            if dtype != "I32"
            else random.integers(-(2**31), 2**31, shape).astype(np.int32)
            for name, (dtype, shape) in self.stored.items()
        }


def _of(
    weight: str, shape: tuple[int, ...], dequantize: Callable[[Parts], np.ndarray], *stored: Any, **config: Any
) -> Format:
    return Format(weight, shape, {name: (dtype, tuple(sizes)) for name, dtype, sizes in stored}, dequantize, config)


def _gptq_format(bits: int, group: int, n: int = 64, k: int = 256, **config: Any) -> Format:
    return _of(
        "m.weight",
        (n, k),
        _gptq_in_activation_order if config.get("desc_act") else _gptq(bits, group),
        ("m.qweight", "I32", (k * bits // 32, n)),
        ("m.qzeros", "I32", (k // group, n * bits // 32)),
        ("m.scales", "F32", (k // group, n)),
        ("m.g_idx", "I32", (k,)),
        quant_method="gptq",
        bits=bits,
        group_size=group,
        **config,
    )


FORMATS = {
    "fp8-blocks": _of(
        "m.weight",
        (1024, 512),
        _fp8_blocks,
        ("m.weight", "F8_E4M3", (1024, 512)),
        ("m.weight_scale_inv", "F32", (8, 4)),
        weight_block_size=[128, 128],
    ),
    "fp8-per-channel": _of(
        "m.weight", (64, 32), _per_channel, ("m.weight", "F8_E4M3", (64, 32)), ("m.weight_scale", "F32", (64, 1))
    ),
    "fp8-per-channel-flat": _of(
        "m.weight", (64, 32), _per_channel, ("m.weight", "F8_E4M3", (64, 32)), ("m.weight_scale", "F32", (64,))
    ),
    "fp8-per-tensor": _of(
        "m.weight",
        (64, 32),
        _per_tensor,
        ("m.weight", "F8_E4M3", (64, 32)),
        ("m.weight_scale", "F32", ()),
        ("m.input_scale", "F32", (1,)),
    ),
    "int8": _of("m.weight", (64, 32), _per_channel, ("m.weight", "I8", (64, 32)), ("m.weight_scale", "BF16", (64, 1))),
    "bitsandbytes-int8": _of("m.weight", (64, 32), _int8, ("m.weight", "I8", (64, 32)), ("m.SCB", "F32", (64,))),
    "gptq-4": _gptq_format(4, 32),
    "gptq-8": _gptq_format(8, 64),
    "gptq-3": _gptq_format(3, 32),
    "awq": _of(
        "m.weight",
        (64, 512),
        _awq,
        ("m.qweight", "I32", (512, 8)),
        ("m.qzeros", "I32", (4, 8)),
        ("m.scales", "F32", (4, 64)),
        quant_method="awq",
        bits=4,
        group_size=128,
    ),
    "compressed-tensors-4": _of(
        "m.weight",
        (64, 128),
        _compressed_tensors,
        ("m.weight_packed", "I32", (64, 16)),
        ("m.weight_scale", "BF16", (64, 4)),
        ("m.weight_zero_point", "I32", (8, 4)),
        ("m.weight_shape", "I32", (2,)),
        config_groups={"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
    ),
    "nvfp4": _of(
        "m.weight",
        (32, 128),
        _nvfp4,
        ("m.weight", "U8", (32, 64)),
        ("m.weight_scale", "F8_E4M3", (32, 8)),
        ("m.weight_scale_2", "F32", ()),
        ("m.input_scale", "F32", ()),
    ),
    "mxfp8": _of("m.weight", (32, 256), _mxfp8, ("m.weight", "F8_E4M3", (32, 256)), ("m.weight_scale", "U8", (32, 8))),
    "mxfp4-experts": _of(
        "experts.w",
        (4, 128, 48),
        _mxfp4_experts,
        ("experts.w_blocks", "U8", (4, 48, 4, 16)),
        ("experts.w_scales", "U8", (4, 48, 4)),
    ),
}

PLACEMENTS: dict[str, Placement] = {
    "outputs": Split(-2),
    "inputs": Split(-1),
    "heads": Split(-2, heads=8),
    "replicated": Replicate(),
    "skipped": Skip(),
}


def _cut(whole: np.ndarray, part: TensorSlice) -> np.ndarray:
    result = np.empty(part.shape, whole.dtype)
    for source, target in boxes_of(part):
        result[target] = whole[source]
    return result


def _check_dequantized(form: Format, rules: ShardRules, placement: Placement, tp: int) -> None:
    index, contents = form.index, form.contents()
    table = resolve(index, rules, Mesh(tp=tp))
    whole = form.dequantize(contents)
    assert whole.shape == form.shape
    for rank in range(tp):
        held = {name: table.slice_of(index.position(name), rank) for name in form.stored}
        weight = placement.share_of(form.shape, tp_index=rank, tp=tp)
        if weight is None:
            assert set(held.values()) == {None}
            continue
        parts = {name: _cut(contents[name], part) for name, part in held.items() if part is not None}
        np.testing.assert_array_equal(form.dequantize(parts), _cut(whole, weight))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_a_rank_holds_dequantizes_to_its_slice(form: str, placement: str) -> None:
    rules = ShardRules({FORMATS[form].weight: PLACEMENTS[placement]})
    legal = [tp for tp in legal_tp(FORMATS[form].index, rules) if tp <= 8]
    assert legal[:2] == [1, 2]
    for tp in legal:
        _check_dequantized(FORMATS[form], rules, PLACEMENTS[placement], tp)


def test_parts_of_a_fused_weight_are_cut_with_it_where_their_blocks_allow() -> None:
    form = FORMATS["fp8-blocks"]
    fused = Split(0, parts=(Part(512, heads=4), Part(256, kv_heads=2), Part(256, kv_heads=2)))
    assert legal_tp(form.index, ShardRules({"m.weight": fused})) == (1, 2, 4)
    for tp in (2, 4):
        _check_dequantized(form, ShardRules({"m.weight": fused}), fused, tp)
    torn = Split(0, parts=(64, 960))
    with pytest.raises(
        ShardingError, match=r"m.weight_scale_inv \[8, 4\]: the weight is cut at index 32 .* inside of the 128"
    ):
        resolve(form.index, ShardRules({"m.weight": torn}), Mesh(tp=2))


@pytest.mark.parametrize(
    ("form", "placement", "tp", "legal", "name"),
    [
        pytest.param("fp8-blocks", Split(1), 8, "1, 2, 4", "m.weight_scale_inv [8, 4]", id="block"),
        pytest.param("gptq-4", Split(1), 16, "1, 2, 4, 8", "m.qzeros [8, 8]", id="group"),
        pytest.param("gptq-4", Split(0), 16, "1, 2, 4, 8", "m.qzeros [8, 8]", id="packed-zero-points"),
        pytest.param("gptq-3", Split(0), 4, "1, 2", "m.qzeros [8, 6]", id="three-bit-zero-points"),
        pytest.param("awq", Split(0), 16, "1, 2, 4, 8", "m.qweight [512, 8]", id="packed-outputs"),
        pytest.param("compressed-tensors-4", Split(1), 8, "1, 2, 4", "m.weight_scale [64, 4]", id="group-of-words"),
        pytest.param("nvfp4", Split(1), 16, "1, 2, 4, 8", "m.weight_scale [32, 8]", id="sixteen"),
        pytest.param("mxfp8", Split(1), 16, "1, 2, 4, 8", "m.weight_scale [32, 8]", id="thirty-two"),
        pytest.param("mxfp4-experts", Split(1), 8, "1, 2, 4", "experts.w_blocks [4, 48, 4, 16]", id="experts"),
    ],
)
def test_a_cut_inside_of_what_is_held_together_is_refused(
    form: str, placement: Placement, tp: int, legal: str, name: str
) -> None:
    with pytest.raises(ShardingError) as raised:
        resolve(FORMATS[form].index, ShardRules({FORMATS[form].weight: placement}), Mesh(tp=tp))
    assert name in str(raised.value)
    assert "inside of the" in str(raised.value)
    assert str(raised.value).endswith(f"tp that works for every tensor: {legal}")


def test_scales_of_a_torn_block_are_held_whole_when_asked() -> None:
    index = FORMATS["fp8-blocks"].index
    table = resolve(index, ShardRules({"m.weight": Split(1), "*.weight_scale_inv": Replicate()}), Mesh(tp=8))
    assert table.slice_of(index.position("m.weight"), 7) == TensorSlice.along((1024, 512), 1, [range(448, 512)])
    assert table.slice_of(index.position("m.weight_scale_inv"), 7) == TensorSlice.whole((8, 4))


def test_activation_order_cuts_outputs_but_not_inputs_unless_every_rank_holds_all_groups() -> None:
    form = _gptq_format(4, 32, desc_act=True)
    _check_dequantized(form, ShardRules({"m.weight": Split(0)}), Split(0), 4)
    with pytest.raises(ShardingError, match=r"m.scales \[8, 64\]: quantized in activation order"):
        resolve(form.index, ShardRules({"m.weight": Split(1)}), Mesh(tp=2))
    rules = ShardRules({"m.weight": Split(1), "*.scales": Replicate(), "*.qzeros": Replicate()})
    _check_dequantized(form, rules, Split(1), 4)


def test_without_a_config_the_order_of_gptq_groups_is_not_known() -> None:
    specs = [TensorSpec(name, *spec) for name, spec in FORMATS["gptq-4"].stored.items()]
    with pytest.raises(ShardingError, match="activation order"):
        resolve(header_only_index(specs, num_files=1), ShardRules({"m.weight": Split(1)}), Mesh(tp=2))


@pytest.mark.parametrize(
    ("config", "legal"),
    [
        pytest.param({"quantization_config": {"weight_block_size": [128, 128]}}, "1", id="config-says"),
        pytest.param({}, "1", id="nobody-says"),
    ],
)
def test_a_shorter_last_block_is_cut_nowhere_but_at_whole_blocks(config: dict[str, Any], legal: str) -> None:
    stored = [TensorSpec("kv.weight", "F8_E4M3", (576, 512)), TensorSpec("kv.weight_scale_inv", "F32", (5, 4))]
    index = header_only_index(stored, num_files=1, config=config)
    with pytest.raises(ShardingError, match=f"for every tensor: {legal}$") as raised:
        resolve(index, ShardRules({"kv.weight": Split(0)}), Mesh(tp=2))
    assert ("cut at index 288" in str(raised.value)) == bool(config)
    assert ("its shape does not tell" in str(raised.value)) == (not config)
    # Replicated it may be, with or without knowing its blocks.
    table = resolve(index, ShardRules({"kv.weight": Replicate()}), Mesh(tp=2))
    assert table.slice_of(index.position("kv.weight_scale_inv"), 1) == TensorSlice.whole((5, 4))


def test_four_bits_of_bitsandbytes_are_refused_or_replicated() -> None:
    stored = [
        TensorSpec("layers.0.q_proj.weight", "U8", (2048, 1)),
        TensorSpec("layers.0.q_proj.weight.absmax", "U8", (64,)),
        TensorSpec("layers.0.q_proj.weight.nested_absmax", "F32", (1,)),
        TensorSpec("layers.0.q_proj.weight.quant_map", "F32", (16,)),
        TensorSpec("layers.0.q_proj.weight.quant_state.bitsandbytes__nf4", "U8", (90,)),
    ]
    index = header_only_index(stored, num_files=1)
    with pytest.raises(ShardingError, match=r"q_proj.weight \[2048, 1\]: bitsandbytes .*whole"):
        resolve(index, ShardRules({"*.q_proj.weight": Split(0)}), Mesh(tp=2))
    table = resolve(index, ShardRules({"*_proj.weight": Replicate()}), Mesh(tp=2))
    assert all(table.slice_of(i, 1) == TensorSlice.whole(index.shape_of(i)) for i in range(len(stored)))
    assert legal_tp(index, ShardRules({"*.q_proj.weight": Split(0)})) == (1,)


def test_an_unknown_number_of_bits_is_refused() -> None:
    stored = [TensorSpec("m.weight_packed", "I32", (64, 16)), TensorSpec("m.weight_scale", "BF16", (64, 4))]
    index = header_only_index(stored, num_files=1)
    with pytest.raises(ShardingError, match=r"m.weight_packed \[64, 16\]: config.json does not say how many bits"):
        resolve(index, ShardRules({"m.weight": Split(0)}), Mesh(tp=2))


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        pytest.param({"input_activations": {"num_bits": 8}}, (64, 4), id="activations"),
        pytest.param({"input_activations": {"num_bits": 8}}, (64, 1), id="activations-by-channel"),
        pytest.param({"kv_cache_scheme": {"num_bits": 8}}, (64, 4), id="kv-cache"),
    ],
)
def test_bits_of_other_things_than_weights_do_not_count(config: dict[str, Any], scales: tuple[int, ...]) -> None:
    stored = [TensorSpec("m.weight_packed", "I32", (64, 64)), TensorSpec("m.weight_scale", "BF16", scales)]
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}, **config}
    index = header_only_index(stored, num_files=1, config={"quantization_config": config})
    table = resolve(index, ShardRules({"m.weight": Split(1)}), Mesh(tp=2))
    assert table.slice_of(index.position("m.weight_packed"), 1) == TensorSlice.along((64, 64), 1, [range(32, 64)])


@pytest.mark.parametrize(
    ("qweight", "qzeros", "scales"),
    [
        # WQLinear_GEMV of AutoAWQ: [outputs, inputs/8], and scales [outputs, groups].
        pytest.param(("I32", (256, 512)), ("I32", (256, 4)), ("F16", (256, 32)), id="awq-gemv"),
        pytest.param(("I8", (256, 2048)), ("I8", (32, 128)), ("F16", (256, 32)), id="bitblas"),
        pytest.param(("U8", (256, 2048)), None, ("U8", (256, 128)), id="fp-quant"),
    ],
)
@pytest.mark.parametrize("placement", [Split(0, heads=16), Split(1)])
def test_words_that_are_packed_otherwise_are_refused(
    placement: Placement, qweight: Any, qzeros: Any, scales: Any
) -> None:
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    stored = [TensorSpec(f"m.{part}", *spec) for part, spec in parts.items() if spec is not None]
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    index = header_only_index(stored, num_files=1, config=config)
    with pytest.raises(ShardingError, match=r"m.qweight .*: not as GPTQ or AWQ \(GEMM\) packs a weight"):
        resolve(index, ShardRules({"m.weight": placement}), Mesh(tp=2))


def test_bitnet_is_refused_or_replicated() -> None:
    stored = [TensorSpec("m.weight", "U8", (16, 64)), TensorSpec("m.weight_scale", "BF16", (1,))]
    index = header_only_index(stored, num_files=1, config={"quantization_config": {"quant_method": "bitnet"}})
    with pytest.raises(ShardingError, match=r"m.weight \[16, 64\]: BitNet packs rows from all over"):
        resolve(index, ShardRules({"m.weight": Split(0)}), Mesh(tp=2))
    table = resolve(index, ShardRules({"m.weight": Replicate()}), Mesh(tp=2))
    assert table.slice_of(0, 1) == TensorSlice.whole(index.shape_of(0))


def test_elements_that_do_not_fill_a_word_are_refused_or_replicated() -> None:
    """compressed-tensors packs 10 elements of 3 bits in a word: 14336 of them end inside the last of 1434 words."""
    stored = [TensorSpec("m.weight_packed", "I32", (32, 1434)), TensorSpec("m.weight_scale", "BF16", (32, 1))]
    # Four words of 10, which would do for 32 elements of 4 bits.
    stored.append(TensorSpec("m.weight_zero_point", "I32", (4, 1)))
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}}
    index = header_only_index(stored, num_files=1, config={"quantization_config": config})
    for placement in (Split(0), Split(1)):
        with pytest.raises(ShardingError, match=r"m.weight_packed \[32, 1434\]: .* do not fill a word"):
            resolve(index, ShardRules({"m.weight": placement}), Mesh(tp=2))
        resolve(index, ShardRules({"m.weight": placement}), Mesh(tp=1))
    table = resolve(index, ShardRules({"m.weight": Replicate()}), Mesh(tp=2))
    assert all(table.slice_of(at, 1) == TensorSlice.whole(index.shape_of(at)) for at in range(3))


def test_zero_points_in_activation_order_are_not_cut_with_the_inputs() -> None:
    stored = FORMATS["compressed-tensors-4"].stored | {"m.weight_g_idx": ("I32", (128,))}
    index = header_only_index(
        [TensorSpec(name, *spec) for name, spec in stored.items()],
        num_files=1,
        config=FORMATS["compressed-tensors-4"].index.config,
    )
    rules = ShardRules({"m.weight": Split(1), "m.weight_scale": Replicate()})
    with pytest.raises(ShardingError, match=r"m.weight_zero_point \[8, 4\]: quantized in activation order"):
        resolve(index, rules, Mesh(tp=2))
    resolve(index, rules + ShardRules({"m.weight_zero_point": Replicate()}), Mesh(tp=2))


def test_a_weight_without_a_rule_leaves_its_parts_without_one() -> None:
    with pytest.raises(ShardingError, match=r"3 tensors .* no rule: .*m.qweight \[32, 64\], m.qzeros"):
        resolve(FORMATS["gptq-4"].index, ShardRules(), Mesh(tp=2))


def test_a_vector_beside_a_cut_weight_is_not_replicated_in_silence(index_of: Callable[..., CheckpointIndex]) -> None:
    index = index_of(
        {"l.0.q_proj.weight": (8, 4), "l.0.q_proj.curious": (8,), "l.0.q_proj.k_scale": (1,), "norm.weight": (4,)}
    )
    with pytest.raises(ShardingError) as raised:
        resolve(index, ShardRules({"*.q_proj.weight": Split(0)}), Mesh(tp=2))
    assert "1 tensor of memory://model lies beside a weight that is cut and has no rule: l.0.q_proj.curious [8]" in str(
        raised.value
    )
    assert 'rules={"l.*.q_proj.curious": Replicate()}' in str(raised.value)
    resolve(index, ShardRules({"*.q_proj.weight": Split(0), "l.*.q_proj.curious": Replicate()}), Mesh(tp=2))
    resolve(index, ShardRules({"*.q_proj.weight": Split(0)}), Mesh(tp=2), unmatched="replicate")
    resolve(index, ShardRules({"*.q_proj.weight": Replicate()}), Mesh(tp=2))


@pytest.mark.parametrize("form", ["gptq-4", "awq", "compressed-tensors-4"])
def test_a_vector_beside_a_cut_quantized_weight_is_not_replicated_in_silence(form: str) -> None:
    stored = FORMATS[form].stored | {"m.curious": ("F16", (64,))}
    index = header_only_index(
        [TensorSpec(name, *spec) for name, spec in stored.items()], num_files=1, config=FORMATS[form].index.config
    )
    with pytest.raises(ShardingError, match=r"lies beside a weight that is cut and has no rule: m.curious \[64\]"):
        resolve(index, ShardRules({"m.weight": Split(0)}), Mesh(tp=2))
    resolve(index, ShardRules({"m.weight": Split(0), "m.curious": Split(0)}), Mesh(tp=2))


def test_a_scale_for_each_input_is_cut_with_the_inputs() -> None:
    """Also where the weight is square, and its shape does not tell."""
    for rows in (64, 32):
        stored = [TensorSpec("m.weight", "F8_E4M3", (rows, 32)), TensorSpec("m.weight_scale", "F32", ())]
        index = header_only_index([*stored, TensorSpec("m.input_scale", "F32", (32,))], num_files=1)
        for placement, part in (
            (Split(0), TensorSlice.whole((32,))),
            (Split(1), TensorSlice.along((32,), 0, [range(16, 32)])),
        ):
            table = resolve(index, ShardRules({"m.weight": placement}), Mesh(tp=2))
            assert table.slice_of(index.position("m.input_scale"), 1) == part


def test_a_scale_for_each_expert_is_cut_with_the_experts() -> None:
    stored = [
        ("weight", "F8_E4M3", (4, 32, 16)),
        ("weight_scale", "F32", (4,)),
        ("input_scale", "F32", (4,)),
    ]
    index = header_only_index([TensorSpec(f"experts.{name}", *spec) for name, *spec in stored], num_files=1)
    for placement, part in (
        (Split(0), TensorSlice.along((4,), 0, [range(2, 4)])),
        (Split(1), TensorSlice.whole((4,))),
    ):
        table = resolve(index, ShardRules({"experts.weight": placement}), Mesh(tp=2))
        for name in ("weight_scale", "input_scale"):
            assert table.slice_of(index.position(f"experts.{name}"), 1) == part


def test_bytes_that_are_no_quantized_weight_stay_bytes(index_of: Callable[..., CheckpointIndex]) -> None:
    table = resolve(index_of({"m.weight": (8, 6)}, dtype="U8"), ShardRules({"m.weight": Split(1)}), Mesh(tp=2))
    assert table.slice_of(0, 1) == TensorSlice.along((8, 6), 1, [range(3, 6)])


@pytest.mark.parametrize("form", ["gptq-4", "awq", "fp8-blocks"])
def test_a_rule_for_one_layer_places_the_parts_of_its_weights(form: str) -> None:
    one = FORMATS[form].index
    parts = [(name, one.dtype_of(at).name, one.shape_of(at)) for at, name in enumerate(one.names)]
    specs = [TensorSpec(f"layers.{layer}.{name}", dtype, shape) for layer in (3, 12) for name, dtype, shape in parts]
    index = header_only_index(specs, num_files=1, config=one.config)
    table = resolve(index, ShardRules({"layers.12.m.weight": Split(0), "*.m.weight": Replicate()}), Mesh(tp=2))
    alone = resolve(one, ShardRules({"m.weight": Split(0)}), Mesh(tp=2))
    for at, (name, _, shape) in enumerate(parts):
        assert table.slice_of(index.position(f"layers.12.{name}"), 1) == alone.slice_of(at, 1)
        assert table.slice_of(index.position(f"layers.3.{name}"), 1) == TensorSlice.whole(shape)


def test_a_weight_without_scales_is_not_quantized_because_others_like_it_are() -> None:
    specs = [TensorSpec(f"layers.{layer}.m.weight", "BF16", (64, 64)) for layer in (0, 1)]
    specs.append(TensorSpec("layers.0.m.weight_scale", "F32", (64, 1)))
    index = header_only_index(specs, num_files=1)
    results = RuleSlices(rules=ShardRules({"*.weight": Split(0)}), dtype="float32")(index, 0).results
    dtypes = {spec.name: spec.dtype for spec in results}
    assert dtypes == {"layers.0.m.weight": "BF16", "layers.0.m.weight_scale": "F32", "layers.1.m.weight": "F32"}
