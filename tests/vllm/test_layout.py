"""`layout="vllm"` is what vLLM's own loader takes: of every tensor of a checkpoint the same elements on each rank, in the same order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from families import FAMILIES, save_checkpoint
from quantized import CONFIGS, save_quantized
from ranks import Layout, on_all_ranks

from ray_streamer.sharding import Mesh
from ray_streamer.sharding.families import family_of
from ray_streamer.sharding.source import RuleSlices

if TYPE_CHECKING:
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.slices import RankSlices

TRANSPOSED = "vLLM's layers hold it transposed"
TURNED = "vLLM turns queries and keys for its rotary embedding"
NOT_OF_VLLM = "vLLM 0.32.0 runs the model by transformers, whose layers gather one run of rows"

DIFFERENCES = {
    "glm": {r"mlp\.gate_up_proj": NOT_OF_VLLM},
    "gpt2": {r"c_(attn|proj|fc)\.weight": TRANSPOSED},
    "gpt_neox": {r"query_key_value": NOT_OF_VLLM},
    "gpt_oss": {
        r"experts\.(gate_up|down)_proj$": TRANSPOSED,
        r"experts\.down_proj_bias": "vLLM adds it on the first rank",
    },
    "llama4_text": {r"self_attn\.[qk]_proj": TURNED, r"experts\.(gate_up|down)_proj$": TRANSPOSED},
}
"""Of each family the names of tensors that lie otherwise, and why."""

LEFT_OUT = {
    # A fused layer has one shape: that of the last of its parts.
    "w4a16": r"\.weight_shape$",
    # Groups are in their order without desc_act.
    "gptq": r"\.g_idx$",
}
"""Of each method the names of tensors that vLLM does not need."""


def elements(said: RankSlices, index: CheckpointIndex) -> dict[str, Any]:
    """For each tensor the elements that a rank takes of it, in the order in which they lie in its results."""
    parts: dict[str, list[tuple[Any, Any]]] = {}
    columns = (said.tensor_ids, said.result_ids, said.pattern_ids, said.target_offsets)
    for tensor, result, pattern, offset in zip(*(column.tolist() for column in columns), strict=True):
        for move in said.patterns[pattern]:
            at = np.indices(move.shape).reshape(len(move.shape), -1)
            source = move.source.offset + np.array(move.source.strides, dtype=int) @ at
            target = move.target.offset + np.array(move.target.strides, dtype=int) @ at
            parts.setdefault(index.names[tensor], []).append((source, (result << 40) + offset + target))
    taken = {}
    for name, of_tensor in parts.items():
        source, target = (np.concatenate(column) for column in zip(*of_tensor, strict=True))
        taken[name] = source[np.argsort(target, kind="stable")]
    return taken


def differing(model: Any, model_config: Any) -> list[str]:
    """Names of tensors of which vLLM's loader, run over lazy tensors, takes something else than the rules say."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    from ray_streamer import load_rank
    from ray_streamer.integrations.captured_slices import CapturedSlices
    from ray_streamer.integrations.vllm.loader import targets_of
    from ray_streamer.settings import Settings

    captured = CapturedSlices(
        model_config.model,
        Settings(),
        load=model.load_weights,
        targets=lambda: targets_of(model),
        skips=lambda _: False,
    )
    said = []

    def slices(index: CheckpointIndex, rank: int) -> RankSlices:
        said.append(captured(index, rank))
        return said[0]

    load_rank(model_config.model, rank=0, world_size=1, slices=slices, out=captured.out)
    index, rank = captured.index, get_tensor_model_parallel_rank()
    rules = RuleSlices(mesh=Mesh(tp=get_tensor_model_parallel_world_size()), layout="vllm")
    theirs, ours = elements(said[0], index), elements(rules(index, rank), index)
    return [name for name in index.names if not np.array_equal(theirs.get(name, []), ours.get(name, []))]


@pytest.mark.parametrize("family", [name for name in FAMILIES if family_of({"model_type": name})])
def test_rules_say_what_vllms_loader_takes(family, tmp_path):
    save_checkpoint(family, tmp_path / "model")
    expected = DIFFERENCES.get(family, {})
    for rank in on_all_ranks(tmp_path / "model", Layout(tp=2), [differing], tmp_path):
        assert [name for name in rank[0].said if not any(re.search(pattern, name) for pattern in expected)] == []


@pytest.mark.usefixtures("fp8_layers_without_a_kernel")
@pytest.mark.parametrize("method", CONFIGS)
def test_rules_say_what_vllms_loader_takes_of_quantized_weights(method, tmp_path):
    save_quantized(method, tmp_path / "model")
    left_out = LEFT_OUT.get(method, "$^")
    for rank in on_all_ranks(tmp_path / "model", Layout(tp=2), [differing], tmp_path):
        assert [name for name in rank[0].said if not re.search(left_out, name)] == []
