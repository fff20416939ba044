"""Elements cast on their way in: what torch makes of safetensors' own slice, wherever blocks cut an element."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from ray_streamer.errors import ShardingError
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Replicate, Split, SplitVocabulary
from ray_streamer.sharding.slice_tables import cast_results, checked_dtypes, fuse_slices, rename_results
from ray_streamer.testing.oracle import bytes_of, cut_by_safetensors

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


def _slices():
    return {
        name: tuple(PLACEMENTS.get(name, Replicate()).slice_of(shape, tp_index=rank, tp=2) for rank in range(2))
        for name, _, shape in TENSORS
    }


def _plan(ranks, folder, *, num_nodes, dtype):
    topology = Topology.even(2, num_nodes)
    plan = ranks.plan(str(folder), _slices(), topology=topology, block_bytes=4096, min_run_bytes=64, max_gap_bytes=100)
    table = cast_results(plan.index, fuse_slices(plan.index, plan.slices, True), dtype)
    return plan, plan_reads(plan.index, table, topology, plan.limits)


def _expected(plan, folder, rank, wished):
    tensors = {}
    for position, name in enumerate(plan.index.names):
        path = folder / plan.index.files[plan.index.file_ids[position]].path
        tensor = cut_by_safetensors(path, name, plan.slice_of(position, rank))
        tensors[name] = tensor.to(wished(name)) if tensor.is_floating_point() else tensor
    fused = torch.cat([tensors.pop(f"x.{part}_proj.weight") for part in ("gate", "up")])
    return tensors | {"x.gate_up_proj.weight": fused}


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 6])
@pytest.mark.parametrize(("num_nodes", "is_resident"), [(1, False), (1, True), (2, False)])
def test_a_rank_holds_what_torch_makes_of_its_slice(ranks, tmp_path, padding, num_nodes, is_resident):
    folder = ranks.write(tmp_path, [TENSORS[:4], TENSORS[4:]], padding=padding)
    plain, plan = _plan(ranks, folder, num_nodes=num_nodes, dtype="bfloat16")
    assert plan.plan_hash != plain.plan_hash
    with ranks.nothing_left():
        paths = {file.path for file in plan.index.files} if is_resident else set()
        running = ranks.prepare(plan, memory_limit=3 * 4096, concurrency=3, resident_paths=paths)
        found = running.start().tensors()
    for rank, tensors in enumerate(found):
        expected = _expected(plain, folder, rank, lambda name: torch.bfloat16)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert _same(tensors[name], tensor), name


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Every bit; as for NaN, which of them a cast makes is torch's business."""
    if not expected.is_floating_point():
        return bytes_of(found) == bytes_of(expected)
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_globs_choose_the_dtype_and_the_first_decides(ranks, tmp_path):
    folder = ranks.write(tmp_path, [TENSORS], padding=3)
    dtype = {"columns.*": torch.float64, "rows.*": "float16", "*half*": "float32", "scalar": "bfloat16"}
    plain, plan = _plan(ranks, folder, num_nodes=1, dtype=dtype)
    wished = {"columns": torch.float64, "rows": torch.float16, "half": torch.float32, "scalar": torch.bfloat16}
    with ranks.nothing_left():
        found = ranks.prepare(plan, memory_limit=2 * 4096).start().tensors()
    for rank in range(2):
        stored = _expected(plain, folder, rank, lambda name: wished.get(name.split(".")[0], _stored(folder, name)))
        assert all(_same(found[rank][name], tensor) for name, tensor in stored.items())
        assert found[rank]["vocabulary.weight"].dtype == torch.float64


def _stored(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return file.get_tensor(name).dtype
    raise KeyError(name)


def test_what_cannot_be_cast_is_refused_or_left(ranks, tmp_path):
    folder = ranks.write(tmp_path, [TENSORS], padding=0)
    plain, _ = _plan(ranks, folder, num_nodes=1, dtype="float32")
    fused = fuse_slices(plain.index, plain.slices, True)
    with pytest.raises(
        ShardingError, match=r"x.gate_up_proj.weight is fused of tensors that dtype=.* casts differently"
    ):
        cast_results(plain.index, fused, {"*gate_proj*": "bfloat16"})
    for wrong in ("int8", "float8_e4m3fn", torch.int32, {"*": "half"}, {3: "float16"}):
        with pytest.raises(ShardingError, match="dtype is one of float16, bfloat16, float32, float64"):
            checked_dtypes(wrong)
    table = cast_results(plain.index, fused, "bfloat16")
    names = {table.results.names[result] for result in table.results.casts}
    assert names.isdisjoint({"numbers", "half.weight"})
    assert rename_results(plain.index, table, {"$": "!"}).results.casts == table.results.casts
    assert not cast_results(plain.index, plain.slices, {"*.none": "float16"}).results.casts


def test_tensors_of_quantized_weights_are_not_cast(ranks, tmp_path):
    tensors = [("q.weight", "F8_E4M3", (8, 8)), ("q.weight_scale", "F32", (8, 1)), ("q.bias", "F32", (8,))]
    folder = ranks.write(tmp_path, [tensors], padding=0)
    whole = {name: (Replicate().slice_of(shape, tp_index=0, tp=1),) for name, _, shape in tensors}
    plan = ranks.plan(str(folder), whole, topology=Topology.even(1), block_bytes=4096)
    table = cast_results(plan.index, plan.slices, "bfloat16")
    assert [table.results.names[result] for result in table.results.casts] == ["q.bias"]
