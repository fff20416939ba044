"""Is this operation a view, a copy, or one that needs values? Told by its schema; a few that need no values are known by name."""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch

_aten = torch.ops.aten


class OperationKind(Enum):
    """How an operation treats its arguments' values."""

    VIEW = auto()
    """Gives views of an argument; reads nothing."""
    COPY_INTO = auto()
    """`target.copy_(source)`."""
    DUPLICATE = auto()
    """New memory with an argument's values, perhaps of another dtype or on another device."""
    JOIN = auto()
    """New memory with several arguments' values, next to each other."""
    SHAPE_ONLY = auto()
    """New memory of an argument's shape and dtype, whose values do not matter."""
    QUESTION = auto()
    """About the tensors, not their values: whether one is pinned, which a lazy one is not, or whether two are of one kind."""
    RESHAPES_IN_PLACE = auto()
    """Changes sizes, strides or the storage of an argument itself."""
    OTHER = auto()
    """Reads values, writes them, or both."""


_BY_NAME: dict[Any, OperationKind] = {
    _aten._unsafe_view: OperationKind.VIEW,
    _aten._reshape_alias: OperationKind.VIEW,
    _aten.copy_: OperationKind.COPY_INTO,
    _aten.clone: OperationKind.DUPLICATE,
    _aten._to_copy: OperationKind.DUPLICATE,
    _aten.cat: OperationKind.JOIN,
    _aten.stack: OperationKind.JOIN,
    _aten.is_pinned: OperationKind.QUESTION,
    _aten._has_compatible_shallow_copy_type: OperationKind.QUESTION,
    **dict.fromkeys(
        (
            _aten.empty_like,
            _aten.zeros_like,
            _aten.ones_like,
            _aten.full_like,
            _aten.rand_like,
            _aten.randn_like,
            _aten.new_empty,
            _aten.new_empty_strided,
            _aten.new_zeros,
            _aten.new_ones,
            _aten.new_full,
        ),
        OperationKind.SHAPE_ONLY,
    ),
}


@cache
def operation_kind(func: Any) -> OperationKind:
    """The kind of an operation as `__torch_dispatch__` gets it: an overload of torch's or of anybody's library."""
    named = _BY_NAME.get(getattr(func, "overloadpacket", None))
    if named is not None and (named is OperationKind.COPY_INTO or not func._schema.is_mutable):
        return named
    if torch.Tag.inplace_view in getattr(func, "tags", ()):
        return OperationKind.RESHAPES_IN_PLACE
    return OperationKind.VIEW if getattr(func, "is_view", False) else OperationKind.OTHER


@cache
def written_arguments(func: Any) -> frozenset[int | str]:
    """Positions and names of the arguments that the operation writes to."""
    arguments = func._schema.arguments
    written = [(at, said.name) for at, said in enumerate(arguments) if said.alias_info and said.alias_info.is_write]
    return frozenset(key for pair in written for key in pair)
