"""Elements cast on their way in: what torch makes of safetensors' own slice, wherever blocks cut an element."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from ray_streamer.errors import PlanError, ShardingError
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh, Replicate, ShardRules, Split, SplitVocabulary
from ray_streamer.sharding.cast import checked_dtypes
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.testing.oracle import bytes_of, expected_results

TENSORS = [
    ("rows.weight", "F32", (34, 777)),
    ("columns.weight", "F32", (1500, 6)),
    ("vocabulary.weight", "F64", (31, 129)),
    ("half.weight", "BF16", (300, 51)),
    ("numbers", "I32", (2000,)),
    ("scalar", "F32", ()),
    ("nothing", "F32", (0, 4)),
    ("x.gate_proj.weight", "F32", (18, 333)),
    ("x.up_proj.weight", "F32", (18, 333)),
]
PLACEMENTS = {
    "rows.weight": Split(0),
    "columns.weight": Split(1),
    "vocabulary.weight": SplitVocabulary(),
    "x.gate_proj.weight": Split(0),
    "x.up_proj.weight": Split(0),
}


def _slices(index, **said):
    """What two ranks hold, gate and up fused."""
    source = RuleSlices(mesh=Mesh(tp=2), rules=ShardRules(PLACEMENTS), unmatched="replicate", fuse=True, **said)
    return [source(index, rank) for rank in range(2)]


def _plan(ranks, folder, *, num_nodes, dtype):
    slices = _slices(ranks.index(str(folder)), dtype=dtype)
    sizes = {"block_bytes": 4096, "min_run_bytes": 64, "max_gap_bytes": 100}
    return ranks.plan(str(folder), slices, topology=Topology.even(2, num_nodes), **sizes)


def _expected(index, folder, rank, wished):
    tensors = expected_results(folder, index, _slices(index)[rank])
    return {name: tensor.to(wished(name)) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 6])
@pytest.mark.parametrize(("num_nodes", "is_resident"), [(1, False), (1, True), (2, False)])
def test_a_rank_holds_what_torch_makes_of_its_slice(ranks, tmp_path, padding, num_nodes, is_resident):
    folder = ranks.write(tmp_path, [TENSORS[:4], TENSORS[4:]], padding=padding)
    plan = _plan(ranks, folder, num_nodes=num_nodes, dtype="bfloat16")
    with ranks.nothing_left():
        paths = {file.path for file in plan.index.files} if is_resident else set()
        running = ranks.prepare(plan, memory_limit=3 * 4096, concurrency=3, resident_paths=paths)
        found = running.start().tensors()
    for rank, tensors in enumerate(found):
        expected = _expected(plan.index, folder, rank, lambda name: torch.bfloat16)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert _same(tensors[name], tensor), name
        stored_bytes = sum(
            tensor.nbytes for tensor in expected_results(folder, plan.index, _slices(plan.index)[rank]).values()
        )
        assert running.loads[rank].statistics().page_cache_bytes == (stored_bytes if is_resident else 0)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Every bit; as for NaN, which of them a cast makes is torch's business."""
    if not expected.is_floating_point():
        return bytes_of(found) == bytes_of(expected)
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_globs_choose_the_dtype_and_the_first_decides(ranks, tmp_path):
    folder = ranks.write(tmp_path, [TENSORS], padding=3)
    dtype = {"columns.*": torch.float64, "rows.*": "float16", "*half*": "float32", "scalar": "bfloat16"}
    plan = _plan(ranks, folder, num_nodes=1, dtype=dtype)
    wished = {"columns": torch.float64, "rows": torch.float16, "half": torch.float32, "scalar": torch.bfloat16}
    with ranks.nothing_left():
        found = ranks.prepare(plan, memory_limit=2 * 4096).start().tensors()
    for rank in range(2):
        stored = _expected(plan.index, folder, rank, lambda name: wished.get(name.split(".")[0], _stored(folder, name)))
        assert all(_same(found[rank][name], tensor) for name, tensor in stored.items())
        assert found[rank]["vocabulary.weight"].dtype == torch.float64


def test_a_glob_that_casts_nothing_is_told(ranks, tmp_path, caplog):
    folder = ranks.write(tmp_path, [TENSORS], padding=0)
    _plan(ranks, folder, num_nodes=1, dtype={"*.wieght": "float16", "*": "float32"})
    assert "dtype casts nothing by '*.wieght': no name matches, or an earlier glob takes them all" in caplog.text


def _stored(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return file.get_tensor(name).dtype
    return torch.float32  # the fused one


def test_what_cannot_be_cast_is_refused_or_left(ranks, tmp_path):
    index = ranks.index(str(ranks.write(tmp_path, [TENSORS], padding=0)))
    with pytest.raises(
        ShardingError, match=r"x.gate_up_proj.weight is fused of tensors that dtype=.* casts differently"
    ):
        _slices(index, dtype={"*gate_proj*": "bfloat16"})
    for wrong in ("int8", "float8_e4m3fn", torch.int32, {"*": "half"}, {3: "float16"}):
        with pytest.raises(ShardingError, match="dtype is one of float16, bfloat16, float32, float64"):
            checked_dtypes(wrong)
    stored = {name: dtype for name, dtype, _ in TENSORS} | {"x.gate_up_proj.weight": "F32"}
    cast = {spec.name: spec.dtype for spec in _slices(index, dtype="bfloat16")[0].results}
    assert {name for name, dtype in cast.items() if dtype == stored[name]} == {"numbers", "half.weight"}
    renamed = _slices(index, dtype="bfloat16", rename={"$": "!"})[0].results
    assert {spec.name: spec.dtype for spec in renamed} == {f"{name}!": dtype for name, dtype in cast.items()}
    untouched = {spec.name: spec.dtype for spec in _slices(index, dtype={"*.none": "float16"})[0].results}
    assert untouched == {name: stored[name] for name in untouched}


def test_elements_narrower_than_a_byte_are_not_cast(ranks, tmp_path):
    index = ranks.index(str(ranks.write(tmp_path, [[("packed", "F4", (4, 6))]])))
    move = Move((4, 6), Side(0, (6, 1)), Side(0, (6, 1)))
    said = RankSlices.from_rows(index, [ResultSpec(name="r", dtype="F32", shape=(4, 6))], [("packed", "r", [move])])
    plan = ranks.plan(str(tmp_path), [said], topology=Topology.even(1))
    with pytest.raises(PlanError, match="F4 cannot be cast to F32"):
        plan.rank_plan(0)


def test_tensors_of_quantized_weights_are_not_cast(ranks, tmp_path):
    tensors = [("q.weight", "F8_E4M3", (8, 8)), ("q.weight_scale", "F32", (8, 1)), ("q.bias", "F32", (8,))]
    index = ranks.index(str(ranks.write(tmp_path, [tensors], padding=0)))
    source = RuleSlices(rules=ShardRules({"*": Replicate()}), dtype="bfloat16")
    dtypes = {spec.name: spec.dtype for spec in source(index, 0).results}
    assert dtypes == {"q.weight": "F8_E4M3", "q.weight_scale": "F32", "q.bias": "BF16"}
