"""What does a captured loader leave behind, whatever it does with its tensors? What the loader itself would have left.

Each trap of real engines' loaders has a test here, with the operation of the engine that it was seen in.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ray_streamer.capture import Capture
from ray_streamer.errors import CaptureError
from ray_streamer.testing.captured_loaders import Reads, assert_same, capture, index_of, make_moves, numbered, same

BF16, F32 = torch.bfloat16, torch.float32


def copying(function):
    """A loader that copies `function(tensor)` of its only tensor into target "p"."""

    def load(weights, targets):
        for _, tensor in weights:
            targets["p"].copy_(function(tensor))

    return load


def check(function, source, *, whole=False):
    """The captured loader equals the loader; its tensor is planned, or read whole."""
    target = torch.full_like(function(source.clone()), 3)
    captured = assert_same({"w": source}, {"p": target}, copying(function))
    assert captured.report.whole.names == (("w",) if whole else ())
    assert captured.reads == (["w"] if whole else [])
    return captured


# Plain loaders


def test_a_row_parallel_slice_is_one_pattern_for_all_layers():
    tensors = {f"layers.{number}.down": numbered(8, 12, start=number) for number in range(5)}
    targets = {name: torch.zeros(8, 6) for name in tensors}

    def load(weights, params):
        for name, tensor in weights:
            params[name].copy_(tensor.narrow(1, 6, 6))

    captured = assert_same(tensors, targets, load)
    assert len(captured.slices.patterns) == 1
    assert captured.report.planned.num_bytes == 5 * 8 * 6 * 4
    assert not captured.reads


def test_stacked_experts_share_a_pattern_whatever_their_place():
    tensors = {f"experts.{number}.{part}": numbered(4, 6, start=number) for number in range(6) for part in ("w1", "w3")}
    targets = {"w13": torch.zeros(6, 8, 6)}

    def load(weights, params):
        for name, tensor in weights:
            _, expert, part = name.split(".")
            params["w13"][int(expert)].narrow(0, 0 if part == "w1" else 4, 4).copy_(tensor)

    captured = assert_same(tensors, targets, load)
    assert len(captured.slices.patterns) == 1
    assert len(captured.slices.results) == 1
    assert sorted(captured.slices.target_offsets.tolist()) == [number * 24 for number in range(12)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["as-stored", "cast"])
@pytest.mark.parametrize("dim", [1, -1])
def test_a_cat_of_stacks_is_planned(dim, dtype):
    """transformers makes a stacked parameter so: experts of each projection are stacked, then projections joined."""
    tensors = {f"experts.{number}.{part}": numbered(4, 6, start=number) for number in range(3) for part in ("w1", "w3")}

    def load(weights, params):
        kept = {name: tensor[1:3].to(dtype) for name, tensor in weights}
        stacks = [torch.stack([kept[f"experts.{number}.{part}"] for number in range(3)]) for part in ("w1", "w3")]
        params["w13"] = torch.cat(stacks, dim=dim)

    captured = assert_same(tensors, {"w13": torch.zeros(0)}, load)
    assert not captured.reads


def test_slices_and_memory_are_those_of_the_parameter():
    room = torch.zeros(10, 8).t()
    captured = assert_same({"w": numbered(8, 10)}, {"p": room}, copying(lambda tensor: tensor))
    (spec,) = captured.slices.results
    assert (spec.name, spec.dtype, spec.shape, spec.strides, spec.zeroes_holes) == ("p", "F32", (8, 10), (1, 8), False)
    assert captured.out["p"] is room


def test_targets_that_share_memory_are_one_result_under_the_first_name():
    weight = torch.zeros(4, 6)
    tensors, targets = {"embed": numbered(4, 6)}, {"embed": weight, "lm_head": weight}
    captured = capture(tensors, targets, lambda weights, params: [params["lm_head"].copy_(w) for _, w in weights])
    assert captured.slices.results.names == ("embed",)
    assert same(weight, tensors["embed"])


def test_a_target_within_a_larger_storage_is_found_by_its_elements():
    fused = torch.zeros(6, 8)
    targets = {"left": fused[:, :4], "right": fused[:, 4:]}
    tensors = {"a": numbered(6, 4), "b": numbered(6, 4, start=90)}

    def load(weights, params):
        for (_, tensor), name in zip(weights, ("left", "right"), strict=True):
            params[name].copy_(tensor)

    captured = capture(tensors, targets, load)
    assert captured.slices.results.names == ("left", "right")
    assert same(fused, torch.cat(list(tensors.values()), dim=1))


def test_what_the_loader_filled_without_a_name_is_filled_too():
    kept = []

    def load(weights, params):
        for _, tensor in weights:
            kept.append(torch.zeros(3, 4))
            kept[0].copy_(tensor)

    captured = capture({"w": numbered(3, 4)}, {}, load)
    assert same(kept[0], numbered(3, 4))
    assert len(captured.slices.results) == 1


def test_what_was_copied_into_memory_that_nobody_holds_is_left_out():
    def load(weights, params):
        for _, tensor in weights:
            torch.zeros(3, 4).copy_(tensor)

    captured = capture({"w": numbered(3, 4)}, {}, load)
    assert len(captured.slices) == 0
    assert not captured.reads


def test_scalars_and_empty_tensors():
    check(lambda tensor: tensor, torch.tensor(4.5))
    check(lambda tensor: tensor.reshape(1), torch.tensor(4.5))
    check(lambda tensor: tensor, numbered(0, 4))
    check(lambda tensor: tensor[2:2], numbered(3, 4))


def test_a_copy_that_repeats_its_source():
    check(lambda tensor: tensor.expand(5, 4), numbered(4))
    check(lambda tensor: tensor.unsqueeze(1).expand(4, 3, 2).reshape(12, 2), numbered(4, 2))


def test_assignment_by_index_and_by_attribute():
    tensors = {"w": numbered(4, 6)}

    def load(weights, params):
        for _, tensor in weights:
            params["p"][1:3, ::2] = tensor[1:3, ::2]
            params["p"].data[0] = tensor[0]

    assert not assert_same(tensors, {"p": torch.zeros(4, 6)}, load).reads


# Copies that stay lazy


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda w: w.view(4, 3, 2, 8).transpose(0, 1).reshape(24, 8)[6:12], id="bloom-qkv"),
        pytest.param(
            lambda w: w.view(4, 3, 2, 8).permute(1, 0, 2, 3).contiguous().view(24, 8).chunk(3)[1], id="falcon"
        ),
        pytest.param(lambda w: w.view(4, 3, 2, 8).transpose(1, 2).reshape(24, 8).narrow(0, 12, 12), id="llama4-qk"),
        pytest.param(lambda w: w.t().contiguous()[2:6], id="gpt2-conv1d"),
        pytest.param(lambda w: w.t().contiguous().t()[:, 4:], id="transposed-twice"),
        pytest.param(lambda w: w.clone().narrow(1, 2, 4), id="clone"),
        pytest.param(lambda w: w.t().clone().narrow(1, 2, 4), id="clone-keeps-strides"),
        pytest.param(lambda w: torch.cat([w[16:], w[:8], w[8:16]])[6:10], id="cat-of-parts"),
        pytest.param(lambda w: torch.cat([w[:, 4:], w[:, :4]], dim=1)[:, 2:7], id="cat-of-columns"),
        pytest.param(lambda w: torch.stack([w[:12], w[12:]], dim=1).reshape(24, 8), id="interleaved-by-stack"),
        pytest.param(lambda w: torch.cat([w[:4].t(), w[4:12].t()], dim=-1)[::2, 1:9], id="cat-of-transposed"),
        pytest.param(lambda w: w.repeat_interleave(2, dim=0), id="repeat-interleave"),
        pytest.param(lambda w: w.t().reshape(-1)[5:150], id="cut-from-a-transposed-copy"),
        pytest.param(lambda w: torch.cat([w.t(), w.t()]).reshape(-1)[5:250], id="cut-from-joined-copies"),
        pytest.param(lambda w: copy.deepcopy(w)[3:], id="deepcopy"),
        pytest.param(lambda w: torch.tensor(w) if type(w) is torch.Tensor else w.clone().detach(), id="detached-clone"),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_copies_of_views_are_planned(function):
    check(function, numbered(24, 8))


def test_a_cast_on_the_way_is_planned():
    for source, target in [(BF16, F32), (F32, BF16), (F32, torch.float16), (torch.float16, torch.float64)]:
        tensors = {"w": (numbered(6, 8) * 1.37).to(source)}
        captured = assert_same(tensors, {"p": torch.zeros(6, 4, dtype=target)}, copying(lambda w: w[:, 2:6]))
        assert captured.report.cast.names == ("w",)
        assert captured.report.cast.num_bytes == 24 * source.itemsize
        captured = assert_same(
            tensors, {"p": torch.zeros(8, 6, dtype=target)}, copying(lambda w, t=target: w.t().to(t))
        )
        assert not captured.reads


def test_casts_that_copy_cannot_make_alone_read_the_tensor():
    twice = lambda tensor: tensor.to(BF16).to(F32)  # noqa: E731
    check(twice, numbered(4, 6) * 1.37, whole=True)
    check(lambda tensor: tensor.to(torch.int32), numbered(4, 6) * 1.37, whole=True)
    check(lambda tensor: tensor.to(F32), numbered(4, 6, dtype=torch.int32), whole=True)
    check(lambda tensor: tensor.to(F32), numbered(4, 6).to(torch.float8_e4m3fn), whole=True)


# Traps 1 to 8


def test_trap_1_operations_in_place_change_what_is_copied_afterwards():
    def load(weights, params):
        for _, tensor in weights:
            row = tensor[2]
            params["before"].copy_(tensor)
            tensor.zero_()
            params["p"].copy_(tensor)
            params["row"].copy_(row)

    targets = {"before": torch.ones(4, 6), "p": torch.ones(4, 6), "row": torch.ones(6)}
    captured = assert_same({"w": numbered(4, 6)}, targets, load)
    assert captured.report.reasons == {"w": "aten.zero_.default"}
    assert captured.report.planned.names == ("w",)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor[1].fill_(9),
        lambda tensor: tensor.t()[0].add_(1),
        lambda tensor: tensor.copy_(torch.ones_like(tensor)),
        lambda tensor: tensor.clone().zero_(),
        lambda tensor: tensor.narrow(0, 2, 2).copy_(tensor.narrow(0, 0, 2)),
        lambda tensor: torch.neg(tensor, out=tensor),
        lambda tensor: tensor.view(torch.int32).zero_(),
        lambda tensor: tensor.index_copy_(0, torch.tensor([1]), tensor[:1] * 2),
        lambda tensor: tensor.masked_fill_(tensor > 5, 0),
        lambda tensor: setattr(tensor, "data", tensor * 2) if type(tensor) is torch.Tensor else tensor.mul_(2),
    ],
)
def test_trap_1_any_operation_in_place(change):
    def changed(tensor):
        change(tensor)
        return tensor

    check(changed, numbered(4, 6), whole=True)


def test_trap_1_an_operation_in_place_returns_the_tensor_itself():
    def load(weights, params):
        for _, tensor in weights:
            assert tensor.mul_(2) is tensor
            params["p"].copy_(tensor)

    assert_same({"w": numbered(4, 6)}, {"p": torch.zeros(4, 6)}, load)


def test_trap_1_a_copy_made_before_a_change_keeps_its_values():
    def load(weights, params):
        for _, tensor in weights:
            kept, view = tensor.t().clone(), tensor[1:]
            tensor.add_(100)
            params["kept"].copy_(kept)
            params["kept2"].copy_(kept.clone())
            kept.zero_()
            params["p"].copy_(view)

    targets = {"kept": torch.zeros(6, 4), "kept2": torch.zeros(6, 4), "p": torch.zeros(3, 6)}
    assert_same({"w": numbered(4, 6)}, targets, load)


def test_trap_2_attributes_of_tensors_and_of_loaders():
    def load(weights, params):
        for _, tensor in weights:
            tensor.shard_id = "q"
            assert tensor.shard_id == "q"
            assert (tensor.grad, tensor.is_leaf, tensor.requires_grad) == (None, True, False)
            params["p"].copy_(tensor.data)
            params["t"].copy_(tensor.T)
            params["real"].copy_(tensor.real)

    targets = {"p": torch.zeros(4, 6), "t": torch.zeros(6, 4), "real": torch.zeros(4, 6)}
    assert not assert_same({"w": numbered(4, 6)}, targets, load).reads


def test_trap_3_reshape_of_a_permuted_view_that_is_no_view():
    captured = check(
        lambda w: w.view(2, 3, 4, 5).permute(2, 0, 3, 1).reshape(4, 30)[:, 5:20], numbered(6, 20), whole=False
    )
    assert captured.report.planned.names == ("w",)


def test_trap_3_what_wraps_around_dimensions_of_a_copy_is_read_whole():
    check(lambda w: w.t().reshape(-1)[1:22:5], numbered(4, 6), whole=True)


def test_trap_4_a_parameter_that_is_read_after_it_was_written():
    def load(weights, params):
        for name, tensor in weights:
            params[name].copy_(tensor)
            params[name].copy_(-torch.exp(params[name].float()))

    tensors = {"A_log": numbered(8) / 10, "other": numbered(8)}
    captured = assert_same(tensors, {"A_log": torch.full((8,), 1e9), "other": torch.zeros(8)}, load)
    assert captured.report.early.names == ("A_log", "other")
    assert captured.report.early.num_bytes == 64


@pytest.mark.parametrize(
    "read", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.sum, np.asarray, copy.deepcopy, None]
)
def test_trap_4_memory_that_is_read_past_the_dispatcher(read):
    seen = []

    def look(tensor):
        if read is None:
            return list(tensor.untyped_storage())
        found = read(tensor)
        return found.tolist() if hasattr(found, "tolist") else found

    def load(weights, params):
        for _, tensor in weights:
            params["p"].copy_(tensor)
            seen.append(look(params["p"]))

    assert_same({"w": numbered(3, 4)}, {"p": torch.zeros(3, 4)}, load)
    assert seen[0] == seen[1]


def test_trap_5_padding_filled_beside_what_is_copied_is_no_barrier():
    def load(weights, params):
        for _, tensor in weights:
            params["embed"][:5].copy_(tensor)
            params["embed"][5:].fill_(0)

    captured = assert_same({"w": numbered(5, 4)}, {"embed": torch.full((8, 4), 7.0)}, load)
    assert not captured.reads


def test_trap_5_interleaved_columns_of_a_fused_parameter_are_no_barrier():
    def load(weights, params):
        for number, (_, tensor) in enumerate(weights):
            params["p"][:, 4 * number : 4 * number + 4].copy_(tensor)
            params["p"][:, 8:].fill_(number)
            params["first"].copy_(params["p"][:, 8])

    targets = {"p": torch.zeros(6, 10), "first": torch.zeros(6)}
    captured = assert_same({"a": numbered(6, 4), "b": numbered(6, 4, start=50)}, targets, load)
    assert not captured.reads


def test_trap_5_overwriting_a_part_of_what_was_copied_keeps_the_order():
    def load(weights, params):
        for number, (_, tensor) in enumerate(weights):
            params["p"][:, number : number + 4].copy_(tensor)
            params["p"][number].fill_(-1)

    captured = assert_same({"a": numbered(6, 4), "b": numbered(6, 4, start=50)}, {"p": torch.zeros(6, 5)}, load)
    assert captured.report.early.names == ("a", "b")


def test_trap_5_copying_the_same_place_again_reads_only_the_last():
    def load(weights, params):
        for _, tensor in weights:
            params["p"].copy_(tensor)

    captured = assert_same({"a": numbered(6, 4), "b": numbered(6, 4, start=50)}, {"p": torch.zeros(6, 4)}, load)
    assert captured.report.planned.names == ("b",)
    assert captured.report.unused.names == ("a",)
    assert not captured.reads


def test_trap_6_a_parameter_replaced_by_the_loader_is_found_by_its_memory():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)

    layer, source = Layer(), numbered(4, 6)
    index = index_of({"w": source})
    recording = Capture(index, Reads({"w": source}))
    with recording:
        layer.weight.data.narrow(0, 1, 2).copy_(recording.tensor("w")[1:3])
        layer.weight = torch.nn.Parameter(layer.weight.detach().t(), requires_grad=False)
    slices, out = recording.slices(dict(layer.named_parameters()))
    make_moves(slices, out, {"w": source}, index.names)
    assert slices.results.names == ("weight",)
    assert same(layer.weight[:, 1:3], source[1:3].t())


def test_trap_6_parameters_given_the_tensor_as_data():
    def load(weights, params):
        for _, tensor in weights:
            params["p"].data = tensor.narrow(1, 1, 3)
            params["p"].data.add_(1)

    assert_same({"w": numbered(4, 6)}, {"p": torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)}, load)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda w, p: w.mul_(2), id="the-tensor-is-changed"),
        pytest.param(lambda w, p: p.data.mul_(2), id="the-parameter-is-changed"),
        pytest.param(lambda w, p: w[1].zero_(), id="a-part-is-changed"),
        pytest.param(lambda w, p: (p.data.add_(1), w.t()[0].fill_(9)), id="both-are-changed"),
        pytest.param(lambda w, p: w.view(torch.int32).zero_(), id="another-dtype"),
        pytest.param(lambda w, p: setattr(p, "data", torch.zeros(4, 3)), id="the-parameter-moves-on"),
        pytest.param(lambda w, p: None, id="nothing"),
    ],
)
@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 6)])
def test_trap_6_a_parameter_given_the_tensor_as_data_is_one_memory_with_it(after, part):
    def load(weights, params):
        for _, tensor in weights:
            params["p"].data = tensor[:, 1:4]
            after(tensor, params["p"])
            params["later"].copy_(tensor[:, part])
            params["twin"].data = tensor[:, 1:4]
            params["twin"].data[0] += 5

    targets = {name: torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False) for name in ("p", "later", "twin")}
    assert_same({"w": numbered(4, 6)}, targets, load)


def test_trap_6_parts_that_parameters_are_given_are_planned():
    def load(weights, params):
        for _, tensor in weights:
            params["left"].data, params["right"].data = tensor[:, :3], tensor[:, 3:]

    targets = {name: torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False) for name in ("left", "right")}
    assert not assert_same({"w": numbered(4, 6)}, targets, load).reads


def test_trap_6_a_parameter_given_a_transposed_tensor_has_its_strides():
    def load(weights, params):
        for _, tensor in weights:
            params["p"].data = tensor.t()
            assert params["p"].stride() == (1, 6)

    targets = {"p": torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False)}
    assert not assert_same({"w": numbered(4, 6)}, targets, load).reads


def test_trap_6_a_parameter_made_of_the_tensor_itself_is_refused_by_name():
    source = numbered(4, 6)
    recording = Capture(index_of({"w": source}), Reads({"w": source}))
    with recording:
        parameter = torch.nn.Parameter(recording.tensor("w"), requires_grad=False)
    assert isinstance(parameter, torch.nn.Parameter)
    with pytest.raises(CaptureError, match=r"layer\.weight is LazyTensor\(w, shape=\(4, 6\)"):
        recording.slices({"layer.weight": parameter})


def test_trap_7_views_as_another_dtype_read_the_tensor():
    check(lambda tensor: tensor.view(torch.uint8), numbered(4, 6, dtype=BF16), whole=True)
    check(lambda tensor: tensor.view(torch.float8_e4m3fn)[1:], numbered(4, 6, dtype=torch.uint8), whole=True)


def test_trap_7_a_target_seen_as_another_dtype_is_a_result_of_that_dtype():
    def load(weights, params):
        for _, tensor in weights:
            params["p"].view(torch.uint8)[1:].copy_(tensor)

    captured = assert_same(
        {"w": numbered(3, 8, dtype=torch.uint8)}, {"p": torch.zeros(4, 2, dtype=torch.float32)}, load
    )
    assert [spec.dtype for spec in captured.slices.results] == ["U8"]
    assert not captured.reads


def test_trap_8_nothing_is_touched_outside_of_what_was_copied():
    def load(weights, params):
        for _, tensor in weights:
            params["sinks"][:4].copy_(tensor)

    targets = {"sinks": torch.full((8,), float("-inf"))}
    captured = assert_same({"w": numbered(4)}, targets, load)
    assert not captured.slices.results[0].zeroes_holes


# Values


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda w: w * 2, id="arithmetic"),
        pytest.param(lambda w: torch.full((2,), w.max().item()), id="item"),
        pytest.param(lambda w: torch.tensor(w.tolist()), id="tolist"),
        pytest.param(lambda w: torch.from_numpy(w.numpy().copy()), id="numpy"),
        pytest.param(lambda w: torch.from_numpy(np.asarray(w).copy()), id="asarray"),
        pytest.param(lambda w: pickle.loads(pickle.dumps(w))[1:], id="pickle"),
        pytest.param(lambda w: w[torch.tensor([2, 0])], id="index-by-tensor"),
        pytest.param(lambda w: torch.nn.functional.pad(w, (0, 2)), id="pad"),
        pytest.param(lambda w: torch.ones(2) if bool((w == w).all()) else torch.zeros(2), id="bool"),
        pytest.param(lambda w: torch.frombuffer(bytearray(bytes(w.untyped_storage())), dtype=F32), id="storage"),
        pytest.param(lambda w: torch.from_dlpack(w.__dlpack__())[1], id="dlpack"),
        pytest.param(lambda w: torch.tensor([float(row.sum()) for row in w]), id="iteration"),
        pytest.param(lambda w: w.flip(0), id="flip"),
        pytest.param(lambda w: torch.cat([w, torch.ones_like(w)]), id="cat-with-real"),
    ],
)
def test_anything_but_views_and_copies_reads_the_tensor_once(function):
    check(function, numbered(4, 6), whole=True)


def test_save_writes_values():
    def saved(tensor):
        file = io.BytesIO()
        torch.save(tensor, file)
        file.seek(0)
        return torch.load(file)

    check(saved, numbered(4, 6), whole=True)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda w: torch.zeros_like(w), id="zeros_like"),
        pytest.param(lambda w: torch.full_like(w, 3, dtype=F32), id="full_like"),
        pytest.param(lambda w: w.new_ones(2, 3), id="new_ones"),
        pytest.param(lambda w: torch.empty_like(w).fill_(2), id="empty_like"),
        pytest.param(lambda w: torch.full((3,), float(len(w) + w.dim() + w.numel() + w.element_size())), id="sizes"),
        pytest.param(lambda w: torch.ones(w.size(0), w.shape[1]) * w.stride(0), id="strides"),
        pytest.param(lambda w: torch.ones(2) * w.is_contiguous() * w.t().is_contiguous(), id="contiguity"),
        pytest.param(lambda w: torch.ones(2) * w.is_floating_point() + w.is_pinned(), id="questions"),
        pytest.param(lambda w: torch.ones(2) * len(repr(w)[:0]), id="repr"),
    ],
)
def test_questions_about_shape_read_nothing(function):
    captured = assert_same(
        {"w": numbered(4, 6)}, {"p": torch.full_like(function(numbered(4, 6)), 9)}, copying(function)
    )
    assert not captured.reads
    assert captured.report.unused.names == ("w",)


def test_a_meta_target_is_left_alone():
    def load(weights, params):
        for _, tensor in weights:
            torch.empty(4, 6, device="meta").copy_(tensor)

    assert not capture({"w": numbered(4, 6)}, {}, load).reads


def test_new_memory_filled_by_the_loader_and_kept_as_parameter():
    class Layer(torch.nn.Module):
        pass

    layer, source = Layer(), numbered(4, 6)
    index = index_of({"w": source})
    recording = Capture(index, Reads({"w": source}))
    with recording:
        made = torch.empty(6, 4)
        made.copy_(recording.tensor("w").t())
        layer.weight = torch.nn.Parameter(made)
    slices, out = recording.slices(dict(layer.named_parameters()))
    make_moves(slices, out, {"w": source}, index.names)
    assert same(layer.weight, source.t())


def test_packed_dtypes_are_read_whole():
    from ray_streamer.testing.layouts import TensorSpec
    from ray_streamer.testing.plan_inputs import header_only_index

    stored = numbered(4, 3, dtype=torch.uint8)
    for dtype, torch_dtype, shape in (("F4", torch.float4_e2m1fn_x2, (4, 6)), ("F6_E2M3", torch.uint8, (4, 4))):
        index = header_only_index([TensorSpec("w", dtype, shape)], num_files=1)
        reader = Reads({"w": stored.view(torch_dtype)})
        target = torch.zeros(4, 3, dtype=torch_dtype)
        recording = Capture(index, reader)
        with recording:
            target[1:].copy_(recording.tensor("w")[1:])
        assert reader.names == ["w"]
        assert same(target[1:].view(torch.uint8), stored[1:])


def test_a_tensor_that_is_let_go_is_not_kept():
    captured = assert_same(
        {f"w{number}": numbered(4, 6, start=number) for number in range(3)},
        {"p": torch.zeros(4, 6)},
        lambda weights, params: [params["p"].add_(tensor * 2) for _, tensor in weights],
    )
    assert captured.reads == ["w0", "w1", "w2"]
    assert captured.report.whole.num_bytes == 3 * 96


def test_broadcasting_errors_are_those_of_torch():
    with pytest.raises(RuntimeError, match="must match"):
        capture({"w": numbered(4, 6)}, {"p": torch.zeros(4, 5)}, copying(lambda tensor: tensor))
    with pytest.raises(RuntimeError, match=r"start .* exceeds"):
        capture({"w": numbered(4, 6)}, {"p": torch.zeros(4, 5)}, copying(lambda tensor: tensor.narrow(1, 4, 5)))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w.t_(), id="t_"),
        pytest.param(lambda w: w.unsqueeze_(1)[:, 0], id="unsqueeze_"),
        pytest.param(lambda w: w.resize_(3, 2), id="resize_"),
        pytest.param(lambda w: w.as_strided_((2, 3), (1, 2), 1), id="as_strided_"),
    ],
)
def test_a_shape_changed_in_place_is_planned(change):
    check(change, numbered(4, 6))


def test_a_tensor_that_is_given_other_memory_in_place_is_refused_by_name():
    with pytest.raises(CaptureError, match=r"aten\.resize_\.default on LazyTensor\(w"):
        capture({"w": numbered(4, 6)}, {"p": torch.zeros(6, 6)}, copying(lambda tensor: tensor.resize_(6, 6)))


def test_a_reader_that_gives_something_else_is_named():
    recording = Capture(index_of({"w": numbered(4, 6)}), lambda names: {"w": torch.zeros(4, 5)})
    with recording, pytest.raises(CaptureError, match=r"'w'.*shape \(4, 6\).*shape \(4, 5\)"):
        recording.tensor("w").sum()
    recording = Capture(index_of({"w": numbered(4, 6)}), lambda names: {})
    with recording, pytest.raises(CaptureError, match="gave nothing"):
        recording.tensor("w").sum()


def test_errors_of_the_reader_come_through():
    def reader(names):
        raise ConnectionResetError(names[0])

    recording = Capture(index_of({"w": numbered(4, 6)}), reader)
    with recording, pytest.raises(ConnectionResetError):
        recording.tensor("w").sum()


def test_torch_is_as_before_afterwards():
    capture({"w": numbered(4, 6)}, {"p": torch.zeros(4, 6)}, copying(lambda tensor: tensor))
    assert type(torch.zeros(2).copy_(torch.ones(2))) is torch.Tensor
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


# Loaders that nobody knew: slower, never wrong


def written_down(loader, source=None, *, shape=(4, 6)):
    """The captured loader of one parameter equals the loader."""
    source = numbered(4, 6) if source is None else source
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=source.dtype), requires_grad=False)

    def load(weights, params):
        for _, tensor in weights:
            loader(tensor, params["p"])

    return assert_same({"w": source}, {"p": parameter}, load)


def held_view(tensor, parameter):
    parameter.data = tensor
    view = parameter.data
    view.mul_(tensor.max())


def held_part(tensor, parameter):
    parameter.data = tensor[:, 1:4]
    view = parameter.data
    tensor.add_(1)
    view[0] = tensor.flip(0)[0, 1:4]


@pytest.mark.parametrize("loader", [held_view, held_part])
def test_a_view_of_data_that_was_given_stays_a_view(loader):
    written_down(loader)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda tensor: tensor.data * 2, id="real"),
        pytest.param(lambda tensor: torch.ones(6, 4).t(), id="strided"),
        pytest.param(lambda tensor: tensor.data.t()[:2], id="of-another-shape"),
    ],
)
def test_a_tensor_of_the_checkpoint_that_is_given_data_is_that(given):
    def load(tensor, parameter):
        tensor.data = given(tensor)
        parameter.data = torch.zeros(tuple(tensor.shape))
        parameter.copy_(tensor)

    written_down(load)


def test_conjugated_views_are_not_taken_for_the_tensor():
    source = torch.complex(numbered(4, 6), numbered(4, 6, start=30))
    written_down(lambda tensor, parameter: parameter.copy_(tensor.conj()), source)
    written_down(lambda tensor, parameter: parameter.copy_(tensor.mH.mT), source)


def changed_by_numpy(tensor, parameter):
    array = parameter.numpy()
    parameter.copy_(tensor)
    array *= 2


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda tensor, parameter: torch.from_numpy(parameter.numpy()).copy_(tensor), id="numpy"),
        pytest.param(lambda tensor, parameter: torch.from_dlpack(parameter.data).copy_(tensor), id="dlpack"),
        pytest.param(changed_by_numpy, id="numpy-first"),
    ],
)
def test_memory_that_is_reached_past_torch_is_filled_at_once(loader):
    assert written_down(loader).reads == ["w"]


def test_memory_that_was_given_back_may_be_another_tensors():
    """Allocators hand out the same memory again, most of the time."""
    held = []

    def load(tensor, parameter):
        for _ in range(20):
            torch.empty(1 << 18).data_ptr()
            held.append(torch.empty(1 << 18))
            held[-1][: tensor.numel()].view(tensor.shape).copy_(tensor)
        parameter.copy_(tensor)

    assert written_down(load).reads == []


@pytest.mark.parametrize("access", ["numpy", "tolist", "data_ptr"])
def test_a_parameter_of_several_pieces_is_whole_when_it_is_reached_past_torch(access):
    def load(tensor, parameter):
        joined = torch.cat([tensor.flatten(), torch.cat((tensor[:, :1], tensor), -1).flatten()])
        getattr(joined, access)()
        parameter.copy_(joined)

    written_down(load, shape=(52,))


def in_a_thread(function):
    thread = threading.Thread(target=torch.no_grad()(function))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("loader", "is_planned"),
    [
        pytest.param(lambda w, p: in_a_thread(lambda: p.copy_(w)), True, id="copies"),
        pytest.param(lambda w, p: in_a_thread(lambda: (p.copy_(w), p.mul_(2))), False, id="copies-and-changes"),
        pytest.param(lambda w, p: (p.copy_(w), in_a_thread(lambda: p.neg_())), False, id="changes"),
        pytest.param(lambda w, p: in_a_thread(lambda: in_a_thread(lambda: (p.copy_(w), p.neg_()))), False, id="nested"),
    ],
)
def test_threads_that_the_loader_starts_are_watched(loader, is_planned):
    assert written_down(loader).reads == ([] if is_planned else ["w"])


def test_a_thread_that_was_there_before_copies_at_once():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        copy = torch.no_grad()(lambda tensor, parameter: (parameter.copy_(tensor), parameter.neg_()))
        assert written_down(lambda tensor, parameter: pool.submit(copy, tensor, parameter).result()).reads == ["w"]


@pytest.mark.parametrize(
    "function",
    [lambda w: w.apply_(lambda value: value + 1), lambda w: w.map_(w.clone(), lambda one, other: one + other)],
)
def test_functions_of_every_element_see_values(function):
    assert written_down(lambda tensor, parameter: parameter.copy_(function(tensor))).reads == ["w"]


def test_a_tensor_that_the_loader_kept_is_read_when_it_is_used():
    source = numbered(4, 6)
    reads = Reads({"w": source})
    recording = Capture(index_of({"w": source}), reads)
    with recording:
        kept = recording.tensor("w")
    target = torch.zeros(4, 6)
    target.copy_(kept)
    assert torch.equal(target, source)
    assert reads.names == ["w"]
    assert not len(recording.slices({"p": target})[0])
