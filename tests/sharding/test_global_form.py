"""Which results are what DTensor calls Shard or Replicate? Compared with where torch itself would cut."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Shard

from ray_streamer import Mesh, Replicate, RuleSlices, ShardRules, Split, SplitGroups, SplitVocabulary
from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import ShardingError
from ray_streamer.settings import Settings
from ray_streamer.sharding.global_form import GlobalForm, global_forms
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import TensorSpec


@pytest.fixture
def opened(tmp_path):
    """Gives the index of a checkpoint of these shapes."""

    def open_index(shapes, dtype="F32", config=None):
        write_checkpoint(tmp_path, [TensorSpec(name, dtype, shape) for name, shape in shapes.items()], config=config)
        return open_checkpoint(
            str(tmp_path), open_storage(str(tmp_path), Settings()), concurrency=1, strict_index=False
        )

    return open_index


def forms_of(index, tp, rules, *, own=0, **arguments):
    source = RuleSlices(mesh=Mesh(tp=tp), rules=ShardRules(rules), **arguments)
    return global_forms(index, [source(index, rank) for rank in range(tp)], own)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [8, 9, 5, 1])
def test_chunks_are_those_of_torch(opened, tp, dim, size):
    shape = (size, 6) if dim == 0 else (6, size)
    index = opened({"w": shape})
    source = RuleSlices(mesh=Mesh(tp=tp), rules=ShardRules({"w": Split(dim, unit=1)}))
    said = [source(index, rank) for rank in range(tp)]
    for rank in range(tp):
        form = global_forms(index, said, rank)["w"]
        assert form.shape == shape
        length = Shard.local_shard_size_and_offset(size, tp, rank)[0] if tp > 1 else size
        assert said[rank].results[0].shape[dim] == length
        assert form.dim in ({dim} if tp > 1 else {None})


def test_what_all_hold_is_replicated_whatever_its_shape(opened):
    index = opened({"w": (4, 4), "scale": (), "none": (0,)})
    assert forms_of(index, 2, {"w": Replicate()}) == {
        "w": GlobalForm((4, 4)),
        "scale": GlobalForm(()),
        "none": GlobalForm((0,)),
    }


@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_without_elements_keeps_its_whole_shape(opened, dim):
    index = opened({"w": (0, 8)})
    for own in range(4):
        form = forms_of(index, 4, {"w": Split(dim)}, own=own)["w"]
        assert form == GlobalForm((0, 8), 1 if dim else None)


@pytest.mark.parametrize(("tp", "rows"), [(2, 128), (4, 128)])
def test_a_padded_vocabulary_is_a_chunk_of_the_padded_one(opened, tp, rows):
    index = opened({"embed": (101, 4)})
    for own in range(tp):
        assert forms_of(index, tp, {"embed": SplitVocabulary(0, pad_to=64)}, own=own) == {
            "embed": GlobalForm((rows, 4), 0)
        }


def test_packed_elements_are_counted_as_torch_does(opened):
    index = opened({"w": (8, 16)}, dtype="F4")
    assert forms_of(index, 2, {"w": Split(1)}) == {"w": GlobalForm((8, 8), 1)}


@pytest.mark.parametrize(
    ("rule", "tp"),
    [
        pytest.param(Split(0, num_parts=2), 2, id="fused-in-the-checkpoint"),
        pytest.param(Split(0, parts=(8, 2, 2)), 2, id="queries-keys-values"),
        pytest.param(SplitGroups(0, groups=4, parts=(1, 1, 1), apart=True), 2, id="groups-taken-apart"),
        pytest.param(Split(0, kv_heads=2), 4, id="heads-that-ranks-share"),
        pytest.param(Split(0, unit=4), 2, id="units-that-torch-does-not-keep"),
    ],
)
def test_what_is_no_chunk_is_refused_and_named(opened, rule, tp):
    index = opened({"model.w": (12, 4), "norm": (4,)})
    assert forms_of(index, 1, {"*.w": rule})["model.w"] == GlobalForm((12, 4)), "one rank holds all of it"
    with pytest.raises(ShardingError, match=r"1 result cannot .*'model\.w': .*chunks of one dimension"):
        forms_of(index, tp, {"*.w": rule})


def test_fused_results_are_refused_with_their_number(opened):
    names = [f"layers.{layer}.{name}_proj.weight" for layer in range(3) for name in ("gate", "up")]
    index = opened(dict.fromkeys(names, (8, 4)))
    with pytest.raises(
        ShardingError, match=r"3 results cannot be a DTensor over tp=2: 'layers\.0\.gate_up_proj\.weight'.*fused"
    ):
        forms_of(index, 2, {"*.weight": Split(0)}, fuse=True)


def test_results_that_only_some_ranks_hold_are_refused(opened):
    index = opened({"a": (4, 4), "b": (4, 4)})
    rules = {"*": Split(0)}
    sources = [
        RuleSlices(mesh=Mesh(tp=2), rules=ShardRules(rules))(index, 0),
        RuleSlices(mesh=Mesh(tp=2), rules=ShardRules(rules), rename={"b": "c"})(index, 1),
    ]
    with pytest.raises(ShardingError, match=r"'b': only some of the ranks hold"):
        global_forms(index, sources, 0)
    assert torch.Size(forms_of(index, 2, rules)["b"].shape) == torch.Size((4, 4))
