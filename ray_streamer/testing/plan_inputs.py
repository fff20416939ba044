"""What does the planner need of a real model whose files nobody has? Its headers, and rules for its names.

The index is made from headers alone, so that a checkpoint of 700 GB can be planned in a test.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.checkpoint.header import parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.sharding import Replicate, ShardRules, Split
from ray_streamer.testing.checkpoints import serialize_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.header import FileHeader
    from ray_streamer.testing.layouts import TensorSpec

DEEPSEEK_V3_RULES = ShardRules(
    {
        "*norm.weight": Replicate(),
        "*.mlp.gate.*": Replicate(),
        "*.q_a_proj.*": Replicate(),
        "*.kv_a_proj_with_mqa.*": Replicate(),
        "*.eh_proj.weight": Replicate(),
        "*.o_proj.*": Split(1),
        "*.down_proj.*": Split(1),
        "*": Split(0),
    }
)
"""Every expert and projection of DeepSeek-V3 cut over tp, for any tp that divides 16."""


def header_only_index(
    tensors: Sequence[TensorSpec],
    *,
    num_files: int,
    config: dict[str, Any] | None = None,
    uri: str = "memory://layout",
) -> CheckpointIndex:
    """The index of a checkpoint of `tensors`, spread in order over `num_files` with about as many tensors each."""
    bounds = np.linspace(0, len(tensors), num_files + 1).astype(int).tolist()
    files: list[ShardFile] = []
    headers: list[FileHeader] = []
    for number, (first, stop) in enumerate(pairwise(bounds), start=1):
        specs = tensors[first:stop]
        head = serialize_header(specs)
        path = f"model-{number:05}-of-{num_files:05}.safetensors"
        files.append(ShardFile(path, len(head) + sum(spec.num_bytes for spec in specs), "layout"))
        headers.append(parse_header(head, file=path, size_bytes=files[-1].size_bytes))
    return CheckpointIndex.from_headers(uri, files, headers, config=config)
