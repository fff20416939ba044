"""Checkpoint indexes without files, since nothing in sharding reads one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.dtypes import DTYPE_CODES

if TYPE_CHECKING:
    from family_support.saved import Saved

    from ray_streamer.sharding import TensorSlice

# Helpers that other processes import, too.
sys.path.append(str(Path(__file__).parent))

from family_support.held import boxes_of

Shapes = Mapping[str, tuple[int, ...]]


def _index_of(shapes: Shapes, *, dtype: str = "F32", config: dict[str, Any] | None = None) -> CheckpointIndex:
    width = max((len(shape) for shape in shapes.values()), default=1)
    padded = [shape + (1,) * (width - len(shape)) for shape in shapes.values()]
    zeros = np.zeros(len(shapes), dtype=np.int64)
    return CheckpointIndex(
        uri="memory://model",
        files=(ShardFile("model.safetensors", 8, "etag"),),
        names=tuple(shapes),
        dtype_codes=np.full(len(shapes), DTYPE_CODES[dtype], dtype=np.uint8),
        shapes=np.array(padded, dtype=np.int64).reshape(len(shapes), width),
        num_dims=np.array([len(shape) for shape in shapes.values()], dtype=np.uint8),
        file_ids=zeros.astype(np.int32),
        starts=zeros,
        stops=zeros.copy(),
        config=config,
    )


def _cut(tensor: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    result = torch.full(part.shape, float("nan"), dtype=tensor.dtype)
    for source, target in boxes_of(part):
        assert result[target].isnan().all(), "two boxes land on one element"
        result[target] = tensor[source]
    filled = result[tuple(map(slice, part.lengths))]
    assert not filled.isnan().any(), "no box lands on an element of the result"
    assert int(filled.numel()) == int((~result.isnan()).sum()), "a box lands behind what is filled"
    return result.nan_to_num(0.0)


@pytest.fixture(scope="session")
def index_of() -> Callable[..., CheckpointIndex]:
    """Index of float32 tensors with these names and shapes."""
    return _index_of


@pytest.fixture(scope="session")
def cut() -> Callable[[torch.Tensor, TensorSlice], torch.Tensor]:
    """The result that a slice describes, with a check that boxes are disjoint and fill it."""
    return _cut


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The tiny model of a type, as transformers writes it."""
    from family_support.saved import write_and_read

    known: dict[str, Saved] = {}

    def save(model_type: str) -> Saved:
        if model_type not in known:
            known[model_type] = write_and_read(model_type, tmp_path_factory.mktemp(model_type), _index_of)
        return known[model_type]

    return save
