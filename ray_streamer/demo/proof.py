"""What must each rank hold? Megatron-LM's convention, written out with nothing but safetensors and slice arithmetic.

`prove` runs beside a rank's tensors and compares bytes. It knows neither this package's rules nor its plan or reader, so it
cannot share their mistakes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ray_streamer.rank.context import RankContext

ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
"""Column-parallel: [outputs, inputs], each rank has an equal share of the outputs, so of dimension 0."""
COLUMNS = ("o_proj.weight", "down_proj.weight")
"""Row-parallel: each rank has an equal share of the inputs, so of dimension 1."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
"""Each rank has ceil(size / tp) rows as long as there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What comparing one rank's tensors with the files gave.

    Attributes:
        rank: Global rank.
        num_tensors: Tensors that are equal, bit for bit.
        num_bytes: Their bytes.
        faults: Names of tensors that are not, or are missing or too many.
    """

    rank: int
    num_tensors: int
    num_bytes: int
    faults: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def expected_slice(view: Any, name: str, *, tp_index: int, tp: int) -> Tensor:
    """What rank `tp_index` must hold of a tensor; `view` is what `safe_open(...).get_slice(name)` gives."""
    shape = view.get_shape()
    if name.endswith("norm.weight"):
        return view[:]
    if name.endswith(ROWS):
        share = shape[0] // tp
        return view[tp_index * share : (tp_index + 1) * share]
    if name.endswith(COLUMNS):
        share = shape[1] // tp
        return view[:, tp_index * share : (tp_index + 1) * share]
    if name.endswith(VOCABULARY):
        share = (shape[0] + tp - 1) // tp
        return view[tp_index * share : min((tp_index + 1) * share, shape[0])]
    raise ValueError(f"the demo knows no tensor called {name}")


def prove(context: RankContext, folder: str) -> Proof:
    """Compares every tensor of this rank with the files in `folder`, byte by byte."""
    from safetensors import safe_open

    coordinate = context.mesh.coordinate(context.rank)
    num_tensors = num_bytes = 0
    faults: list[str] = []
    seen: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                expected = expected_slice(file.get_slice(name), name, tp_index=coordinate["tp"], tp=context.mesh.tp)
                seen.add(name)
                if _is_equal(context.tensors.get(name), expected):
                    num_tensors, num_bytes = num_tensors + 1, num_bytes + expected.nbytes
                else:
                    faults.append(name)
    faults += sorted(set(context.tensors) - seen)
    return Proof(rank=context.rank, num_tensors=num_tensors, num_bytes=num_bytes, faults=tuple(faults))


def _is_equal(actual: Tensor | None, expected: Tensor) -> bool:
    """Whether dtype, shape and every bit agree; as numbers, the same NaN would not be equal."""
    import torch

    if actual is None or actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))
