"""What a model keeps of a checkpoint, instead of copying it, becomes real memory that the load fills; needs no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ray_streamer.capture import Capture
from ray_streamer.integrations.vllm.kept_tensors import fill_kept
from ray_streamer.testing.captured_loaders import Reads, index_of, make_moves, numbered

if TYPE_CHECKING:
    from collections.abc import Callable

TENSORS = {"first": numbered(4, 6), "second": numbered(6, start=40, dtype=torch.bfloat16)}


def loaded(
    keep: Callable[[nn.Module, torch.Tensor, torch.Tensor], None], device: str = "cpu"
) -> tuple[nn.Module, Capture]:
    """A module after a loader that keeps tensors, filled as a load fills it."""
    model, index = nn.Module(), index_of(TENSORS)
    model.inner = nn.Module()
    capture = Capture(index, Reads(TENSORS))
    with capture:
        keep(model, *(capture.tensor(name) for name in TENSORS))
        fill_kept(model, device)
    slices, out = capture.slices(dict(model.named_parameters()) | dict(model.named_buffers()))
    make_moves(slices, out, TENSORS, index.names)
    return model, capture


def test_parameters_buffers_and_attributes_are_filled_by_plan():
    def keep(model, first, second):
        model.weight = nn.Parameter(first[1:3])
        model.inner.scale = nn.Parameter(second.to(torch.float32), requires_grad=False)
        model.register_buffer("table", first.t())
        model.note = second

    model, capture = loaded(keep)
    assert type(model.weight) is nn.Parameter
    assert type(model.table) is type(model.note) is torch.Tensor
    assert model.weight.requires_grad
    assert not model.inner.scale.requires_grad
    assert torch.equal(model.weight, TENSORS["first"][1:3])
    assert torch.equal(model.inner.scale, TENSORS["second"].float())
    assert torch.equal(model.table, TENSORS["first"].t())
    assert torch.equal(model.note, TENSORS["second"])
    assert not capture.report.early
    assert not capture.report.whole


def test_a_tie_stays_one_and_keeps_what_was_set_on_it():
    def keep(model, first, second):
        model.weight = nn.Parameter(first)
        model.weight.weight_loader = print
        model.inner.weight = model.weight

    model, _ = loaded(keep)
    assert model.inner.weight is model.weight
    assert vars(model.weight) == {"weight_loader": print}
    assert torch.equal(model.weight, TENSORS["first"])


def test_what_the_loader_changed_first_is_kept_changed():
    def keep(model, first, second):
        model.weight = nn.Parameter(first.mul_(2) + 1)
        model.bias = nn.Parameter(second.neg_())

    model, _ = loaded(keep)
    assert torch.equal(model.weight, TENSORS["first"] * 2 + 1)
    assert torch.equal(model.bias, -TENSORS["second"])


def test_what_is_elsewhere_than_the_load_fills_is_read_at_once():
    """As a tensor on the CPU beside a model on a GPU: the load fills memory of the GPU only."""

    def keep(model, first, second):
        model.note = second

    model, capture = loaded(keep, "cuda:0")
    assert torch.equal(model.note, TENSORS["second"])
    assert capture.report.early.names == ("second",)
    assert not capture.report.planned
