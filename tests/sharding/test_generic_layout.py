"""The generic layout against the models themselves: each rank runs transformers' own modules on its slices.

Attention and MLP are copied out of the whole model, given one rank's slices in place of their weights and told how many heads
those are; what the ranks give is summed, and the sum is what the whole module gives. This is what tensor parallelism relies on,
for fused projections, heads that take turns, shared key-value heads, experts in blocks and transposed weights alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_support.held import resolve
from family_support.tiny_models import save_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.sharding import Mesh, ShardRules, TensorSlice

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

IndexOf = Callable[..., CheckpointIndex]
Cut = Callable[[torch.Tensor, TensorSlice], torch.Tensor]

BLOCKS = (".self_attn", ".self_attention", ".attention", ".attn", ".linear_attn", ".mlp", ".feed_forward")
"""Modules whose outputs ranks sum; each is run by itself, with the inputs that it has in the whole model."""
STACKED_ON_DISK = ("gpt_oss", "llama4_text", "gemma4_text")
"""Families whose experts are stacked on disk as they are in memory; of others only blocks without experts are run."""
SHARED = {
    "num_heads": 8,
    "num_attention_heads": 8,
    "split_size": 64,
    "num_kv_heads": 4,
    "num_k_heads": 4,
    "num_v_heads": 8,
    "key_dim": 32,
    "value_dim": 64,
    "conv_dim": 128,
    "expert_dim": 96,
}
"""What modules remember of their whole size beside their weights' shapes: attribute -> value in the tiny models."""


@dataclass(frozen=True)
class Call:
    """One run of a module in the whole model."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor


@pytest.mark.parametrize("tp", [2, 8])
@pytest.mark.parametrize(
    ("model_type", "num_blocks"),
    [
        ("llama", 4),
        ("qwen2", 4),
        ("qwen3", 4),
        ("gemma3_text", 4),
        ("phi", 4),
        ("glm4", 4),
        ("cohere", 4),
        ("starcoder2", 4),
        ("deepseek_v2", 3),
        ("deepseek_v3", 3),
        ("gpt_oss", 4),
        ("llama4_text", 4),
        ("gemma4_text", 4),
        ("gpt2", 4),
        ("falcon", 4),
        ("bloom", 4),
        ("gpt_neox", 4),
    ],
)
def test_what_ranks_give_adds_up(
    model_type: str, num_blocks: int, tp: int, index_of: IndexOf, cut: Cut, tmp_path: Path
) -> None:
    check_sums(model_type, num_blocks, tp, index_of, cut, tmp_path)


@pytest.mark.parametrize("tp", [2, 4])
def test_linear_attention_adds_up(tp: int, index_of: IndexOf, cut: Cut, tmp_path: Path) -> None:
    """Of Qwen3-Next, whose four key heads are not shared."""
    check_sums("qwen3_next", 2, tp, index_of, cut, tmp_path)


def check_sums(model_type: str, num_blocks: int, tp: int, index_of: IndexOf, cut: Cut, tmp_path: Path) -> None:
    """Runs every rank's blocks of a tiny model, and compares the sums with the whole model's."""
    model = save_model(model_type, tmp_path, torch.float64)
    calls = record_calls(model)
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    index = index_of(shapes, dtype="F64", config=AutoConfig.from_pretrained(tmp_path).to_dict())
    table = resolve(index, ShardRules.for_config(index.config), Mesh(tp=tp))
    sums = {name: torch.zeros_like(call.output) for name, call in calls.items()}
    for rank in range(tp):
        parts = [table.slice_of(tensor, rank) for tensor in range(len(index))]
        slices = {name: cut(tensors[name], part) for name, part in zip(index.names, parts, strict=True) if part}
        for name, call in calls.items():
            module = rank_module(model, name, slices, rank, tp)
            sums[name] += run(module, call, rank, tp)
    for name, call in calls.items():
        # Llama 4 turns its queries in single precision, whatever the model's.
        torch.testing.assert_close(sums[name], call.output, rtol=1e-6, atol=1e-6, msg=name)
    assert len(calls) == num_blocks


def record_calls(model: PreTrainedModel) -> dict[str, Call]:
    """What every block whose weights have the same names on disk gets and gives."""
    calls: dict[str, Call] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        has_experts = any("experts" in inner for inner, _ in module.named_modules())
        if name.endswith(BLOCKS) and (model.config.model_type in STACKED_ON_DISK or not has_experts):

            def record(_: nn.Module, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
                # Falcon goes on adding to it.
                calls[name] = Call(arguments, keywords, first(output).clone())

            handles.append(module.register_forward_hook(record, with_kwargs=True))
    with torch.no_grad():
        model(torch.arange(1, 7)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def rank_module(model: PreTrainedModel, name: str, slices: dict[str, torch.Tensor], rank: int, tp: int) -> nn.Module:
    """A copy of one module of the model with a rank's slices for weights."""
    module = copy.deepcopy(model.get_submodule(name))
    for inner_name, inner in module.named_modules():
        for parameter_name, parameter in inner.named_parameters(recurse=False):
            whole_name = ".".join(part for part in (name, inner_name, parameter_name) if part)
            given = slices[whole_name]
            # A bias that no rank cuts is added by one of them.
            is_added_once = "bias" in parameter_name and given.shape == parameter.shape and rank > 0
            parameter.data = torch.zeros_like(given) if is_added_once and "router" not in whole_name else given
        for attribute, whole in SHARED.items():
            if getattr(inner, attribute, None) == whole:
                setattr(inner, attribute, max(1, whole // tp))
        if hasattr(inner, "num_key_value_groups"):
            inner.num_key_value_groups = min(model.get_submodule(name).num_key_value_groups, max(1, 8 // tp))
        if hasattr(inner, "nf"):
            inner.nf = inner.weight.shape[1]
        if isinstance(inner, nn.Conv1d):
            inner.groups = inner.weight.shape[0]
    return module


def run(module: nn.Module, call: Call, rank: int, tp: int) -> torch.Tensor:
    """What the module gives for the inputs of the whole one; where it adds a residual, one rank does."""
    arguments, keywords = list(call.arguments), dict(call.keywords)
    if type(module).__name__ in ("BloomAttention", "BloomMLP") and rank:
        arguments[1] = torch.zeros_like(arguments[1])
    if isinstance(alibi := keywords.get("alibi"), torch.Tensor):
        keywords["alibi"] = alibi.chunk(tp)[rank]
    with torch.no_grad():
        return first(module(*arguments, **keywords))


def first(output: Any) -> torch.Tensor:
    """The tensor of interest: modules may give weights and caches, too."""
    return output[0] if isinstance(output, tuple) else output
