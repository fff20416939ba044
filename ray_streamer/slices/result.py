"""What is one result of a rank? Its name, dtype, shape and strides in one value; of many results, columns of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, overload

import numpy as np

from ray_streamer.dtypes import DTYPE_CODES, dtype_named
from ray_streamer.errors import PlanError
from ray_streamer.slices.move import row_major, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ray_streamer.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultForm:
    """What results that differ in their names only have in common.

    Attributes:
        dtype: Of the elements, as a safetensors header names it; another one than the checkpoint's means a cast.
        shape: Logical elements.
        strides: In elements, of a tensor that the caller has already; None for one of ours, which is contiguous.
        zeroes_holes: Whether elements that no move fills become zero. Rules ask for it (a padded vocabulary); what an engine's
            loader was seen to fill itself must be left as it is.

    Raises:
        PlanError: A value cannot mean anything.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    zeroes_holes: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", whole_numbers(self.shape, "a result's shape"))
        if self.strides is not None:
            object.__setattr__(self, "strides", whole_numbers(self.strides, "a result's strides"))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_CODES:
            raise PlanError(f"{self!r} has an unknown dtype; safetensors has {', '.join(DTYPE_CODES)}")
        if any(size < 0 for size in self.shape):
            raise PlanError(f"{self!r} has a negative size")
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise PlanError(f"{self!r} needs as many strides as sizes")
        if any(stride < 0 for stride in self.strides or ()):
            raise PlanError(f"{self!r} has a negative stride")

    @property
    def stored(self) -> DType:
        """The dtype, with its width."""
        return dtype_named(self.dtype)

    @property
    def memory_strides(self) -> tuple[int, ...]:
        """Strides in elements, also of a tensor of ours."""
        return row_major(self.shape) if self.strides is None else self.strides

    @property
    def num_bytes(self) -> int:
        """Of its elements; strides may leave gaps between them."""
        return math.prod(self.shape) * self.stored.num_bits // 8

    @property
    def num_storage_elements(self) -> int:
        """Elements from the first of its memory to one past the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.memory_strides, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultSpec(ResultForm):
    """One tensor that a rank ends with: a form with a name.

    Attributes:
        name: What the caller finds it under; no two results of a rank alike.
    """

    name: str

    def __post_init__(self) -> None:
        # Of the class that `slots` leaves behind, `super()` alone knows nothing.
        super(ResultSpec, self).__post_init__()
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"a result's name is text, got {self.name!r}")

    @property
    def form(self) -> ResultForm:
        """All but the name."""
        return ResultForm(dtype=self.dtype, shape=self.shape, strides=self.strides, zeroes_holes=self.zeroes_holes)


@dataclass(frozen=True, slots=True)
class ResultSpecs(Sequence[ResultSpec]):
    """All results of a rank, as columns: a rank may have 92,000, of tens of forms.

    Attributes:
        names: Of each result; no two alike.
        forms: Distinct forms.
        form_ids: For each result its position in `forms`; int32.

    Raises:
        PlanError: The columns disagree, or two results have one name.
    """

    names: tuple[str, ...] = field(repr=False)
    forms: tuple[ResultForm, ...]
    form_ids: NDArray[np.int32] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.form_ids):
            raise PlanError(f"{len(self.names)} names of results need as many forms, got {len(self.form_ids)}")
        if len(self.form_ids) and not 0 <= self.form_ids.min() <= self.form_ids.max() < len(self.forms):
            raise PlanError(f"form_ids of results must be between 0 and {len(self.forms) - 1}")
        if len(set(self.names)) < len(self.names):
            seen: set[str] = set()
            repeated = sorted({name for name in self.names if name in seen or seen.add(name)})[:5]
            raise PlanError(f"several results of a rank have one name: {', '.join(repeated)}")

    @classmethod
    def of(cls, specs: Iterable[ResultSpec]) -> Self:
        """Columns of `specs`, in their order."""
        if isinstance(specs, cls):
            return specs
        forms: dict[ResultForm, int] = {}
        listed = tuple(specs)
        form_ids = np.array([forms.setdefault(spec.form, len(forms)) for spec in listed], dtype=np.int32)
        return cls(tuple(spec.name for spec in listed), tuple(forms), form_ids)

    def form_of(self, number: int) -> ResultForm:
        """The form of the result at position `number`."""
        return self.forms[self.form_ids[number]]

    def __len__(self) -> int:
        """Number of results."""
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> ResultSpec: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[ResultSpec, ...]: ...

    def __getitem__(self, number: int | slice) -> ResultSpec | tuple[ResultSpec, ...]:
        """One result, or several."""
        if isinstance(number, slice):
            return tuple(self[at] for at in range(*number.indices(len(self))))
        form = self.form_of(number)
        return ResultSpec(
            name=self.names[number],
            dtype=form.dtype,
            shape=form.shape,
            strides=form.strides,
            zeroes_holes=form.zeroes_holes,
        )

    def __eq__(self, other: object) -> bool:
        """Whether both hold equal results in the same order."""
        return isinstance(other, ResultSpecs) and tuple(self) == tuple(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # they may hold arrays
