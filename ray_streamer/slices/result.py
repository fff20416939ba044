"""What is one result of a rank? Its name, dtype, shape and strides in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.dtypes import DTYPE_CODES, dtype_named
from ray_streamer.errors import PlanError
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from ray_streamer.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultSpec:
    """One tensor that a rank ends with.

    Attributes:
        name: What the caller finds it under; no two results of a rank alike.
        dtype: Of its elements, as a safetensors header names it; another one than the checkpoint's means a cast.
        shape: Logical elements.
        strides: In elements, of a tensor that the caller has already; None for one of ours, which is contiguous.
        zeroes_holes: Whether elements that no move fills become zero. Rules ask for it (a padded vocabulary); what an engine's
            loader was seen to fill itself must be left as it is.

    Raises:
        PlanError: A value cannot mean anything.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    zeroes_holes: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_CODES:
            raise PlanError(f"result {self.name!r} has dtype {self.dtype!r}; safetensors has {', '.join(DTYPE_CODES)}")
        if any(size < 0 for size in self.shape):
            raise PlanError(f"result {self.name!r} has a negative size: {self.shape}")
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise PlanError(f"result {self.name!r} has shape {self.shape} and strides {self.strides}")

    @property
    def stored(self) -> DType:
        """The dtype, with its width."""
        return dtype_named(self.dtype)

    @property
    def memory_strides(self) -> tuple[int, ...]:
        """Strides in elements, also of a tensor of ours."""
        return row_major(self.shape) if self.strides is None else self.strides

    @property
    def num_storage_elements(self) -> int:
        """Elements from the first of its memory to one past the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.memory_strides, strict=True))
