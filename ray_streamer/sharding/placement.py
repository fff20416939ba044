"""How does one tensor lie on the tp axis? Each kind of placement says whether a tensor can lie so, and what each rank holds.

First `refusal`: why this shape cannot be placed on so many ranks, if so; then `share_of`: the part that one of them
holds. Names, dtypes and the other axes of the mesh do not appear here. Which placement a tensor has is the business of
the rules.

The conventions are those of Megatron-LM and of vLLM 0.32 (`vllm/model_executor/layers/linear.py`), which agree on whole
heads, on shared key-value heads and on fused projections, and those of transformers 5.23, which cuts what does not
divide into chunks that are not alike. What the layouts of a model family make of them is said in `presets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.part import Part, as_parts, check_grain, check_parts, chunk, first_refusal, is_count
from ray_streamer.sharding.tensor_slice import TensorSlice
from ray_streamer.units import counted, verb


class Placement(ABC):
    """What is common to all: two pure questions. Subclasses are frozen and hashable."""

    __slots__ = ()

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be placed on `tp` ranks, or None when it can."""
        return None

    @abstractmethod
    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice | None:
        """What the rank at `tp_index` holds of a tensor of `shape`; None when nothing.

        Only for shapes that `refusal` lets pass.
        """


@dataclass(frozen=True, slots=True)
class Replicate(Placement):
    """Every rank holds the whole tensor."""

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """All of it."""
        return TensorSlice.whole(shape)


@dataclass(frozen=True, slots=True)
class Skip(Placement):
    """No rank holds the tensor; not a byte of it is read."""

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> None:
        """Nothing of it."""


@dataclass(frozen=True, slots=True)
class Split(Placement):
    """Each rank holds a share of one dimension, an equal one unless `unit` is given.

    >>> Split(0, parts=(4, 2)).share_of((6, 8), tp_index=1, tp=2)
    TensorSlice(indices=((range(2, 4), range(5, 6)), (range(0, 8),)), shape=(3, 8))

    Attributes:
        dim: Dimension of the checkpoint's tensor; negative counts from the last.
        heads: The dimension is this many attention heads; only whole heads are cut off.
        kv_heads: The same for keys and values; fewer heads than ranks are shared, see `Part`.
        unit: So many indices stay together; the last ranks may hold less than others, or nothing, see `Part`.
        parts: A fused tensor: sizes (or `Part`s) of the sub-blocks that make up the dimension, such as the q, k and v
            of a fused projection. Each one is split on its own, and a rank's shares lie one after the other in its
            result.
        num_parts: The same for parts of equal size, such as gate and up: how many there are.

    Raises:
        ShardingError: A number is out of range, or more than one of `heads`, `kv_heads`, `unit` and `parts` is given.
    """

    dim: int
    heads: int | None = None
    kv_heads: int | None = None
    parts: tuple[int | Part, ...] = ()
    unit: int | None = None
    num_parts: int = 1

    def __post_init__(self) -> None:
        _check_dim(self, self.dim)
        check_grain(self, self.heads, self.kv_heads, self.unit)
        check_parts(self, self.parts)
        if self.parts and (self.heads or self.kv_heads or self.unit):
            raise ShardingError(f"a split in parts has heads and units in its parts, not beside them: {self!r}")
        if not is_count(self.num_parts, least=1) or (self.parts and self.num_parts > 1):
            raise ShardingError(f"num_parts is at least 1, and goes without parts: {self!r}")

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp` ranks, or None when it can."""
        if absent := _absent_dim(shape, self.dim):
            return absent
        dim = self.dim % len(shape)
        parts = self._parts_of(shape[dim])
        return _wrong_total(shape, dim, sum(part.size for part in parts)) or first_refusal(dim, parts, tp)

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """The share of the rank at `tp_index`."""
        dim = self.dim % len(shape)
        ranges: list[range] = []
        offset = 0
        for part in self._parts_of(shape[dim]):
            start, stop = part.range_of(tp_index, tp)
            ranges.append(range(offset + start, offset + stop))
            offset += part.size
        return TensorSlice.along(shape, dim, ranges)

    def _parts_of(self, size: int) -> tuple[Part, ...]:
        if not self.parts:
            return (Part(size // self.num_parts, self.heads, self.kv_heads, self.unit),) * self.num_parts
        return as_parts(self.parts)


@dataclass(frozen=True, slots=True)
class SplitGroups(Placement):
    """A fused dimension in which attention heads take turns: groups of equal build, each with its own queries, key and value.

    Each rank holds whole groups; where there are fewer groups than ranks, neighbouring ranks share a group, and its
    parts are split among them.

    >>> SplitGroups(0, groups=2, parts=(2, 1, 1)).share_of((8,), tp_index=1, tp=2)
    TensorSlice(indices=((range(4, 8),),), shape=(4,))

    Attributes:
        dim: Dimension of the checkpoint's tensor; negative counts from the last.
        groups: How many there are.
        parts: Sizes (or `Part`s) of what makes up one group; `Part`s say how ranks that share a group split them.
        apart: Whether a rank's result holds the first parts of all its groups, then all second parts and so on; else the
            groups stay as they are.

    Raises:
        ShardingError: A number is out of range, or there are no parts.
    """

    dim: int
    groups: int
    parts: tuple[int | Part, ...]
    apart: bool = False

    def __post_init__(self) -> None:
        _check_dim(self, self.dim)
        check_parts(self, self.parts)
        if not self.parts or not is_count(self.groups, least=1):
            raise ShardingError(f"at least one group and one part are needed: {self!r}")

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp` ranks, or None when it can."""
        if absent := _absent_dim(shape, self.dim):
            return absent
        dim = self.dim % len(shape)
        if wrong := _wrong_total(shape, dim, self.groups * self._group_size()):
            return wrong
        if self.groups % tp == 0:
            return None
        if tp % self.groups:
            return f"dimension {dim}: {counted(self.groups, 'group')} of heads neither {verb(self.groups, 'divides', 'divide')} among nor {verb(self.groups, 'shares', 'share')} out over tp={tp}"
        return first_refusal(dim, as_parts(self.parts), tp // self.groups)

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """The share of the rank at `tp_index`."""
        dim = self.dim % len(shape)
        size = self._group_size()
        if self.groups % tp:
            group, share = divmod(tp_index, tp // self.groups)
            held = [(start, part.range_of(share, tp // self.groups)) for start, part in self._starts(group * size)]
            return TensorSlice.along(shape, dim, [range(start + first, start + stop) for start, (first, stop) in held])
        mine = range(self.groups // tp * tp_index, self.groups // tp * (tp_index + 1))
        if not self.apart:
            return TensorSlice.along(shape, dim, [range(mine.start * size, mine.stop * size)])
        ranges = [
            range(group * size + start, group * size + start + part.size)
            for start, part in self._starts(0)
            for group in mine
        ]
        return TensorSlice.along(shape, dim, ranges)

    def _group_size(self) -> int:
        return sum(part.size for part in as_parts(self.parts))

    def _starts(self, offset: int) -> list[tuple[int, Part]]:
        """Where each part of the group that starts at `offset` starts."""
        starts: list[tuple[int, Part]] = []
        for part in as_parts(self.parts):
            starts.append((offset, part))
            offset += part.size
        return starts


@dataclass(frozen=True, slots=True)
class SplitVocabulary(Placement):
    """Each rank holds a chunk of the vocabulary; the last ranks' chunks may be shorter, or empty.

    Chunks have ceil(size / tp) indices as long as there are any: the rule of `torch.chunk`, and of transformers 5.23
    for embeddings and heads. With `pad_to`, as in vLLM 0.32, all ranks hold as many: the vocabulary is taken as
    rounded up to a multiple of `pad_to`, and what the checkpoint does not have is zero.

    >>> [SplitVocabulary().share_of((9, 4), tp_index=index, tp=4).shape for index in range(4)]
    [(3, 4), (3, 4), (3, 4), (0, 4)]
    >>> SplitVocabulary(pad_to=8).share_of((9, 4), tp_index=2, tp=4)
    TensorSlice(indices=((range(8, 9),), (range(0, 4),)), shape=(4, 4))

    Raises:
        ShardingError: A number is out of range.
    """

    dim: int = 0
    pad_to: int | None = None

    def __post_init__(self) -> None:
        _check_dim(self, self.dim)
        if self.pad_to is not None and not is_count(self.pad_to, least=1):
            raise ShardingError(f"a vocabulary is padded to a multiple of at least 1: {self!r}")

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp` ranks, or None when it can."""
        if absent := _absent_dim(shape, self.dim):
            return absent
        padded = self._padded(shape[self.dim])
        if self.pad_to and padded % tp:
            return f"dimension {self.dim % len(shape)}: {counted(padded, 'index', 'indices')} with padding {verb(padded, 'does', 'do')} not divide among tp={tp}"
        return None

    def share_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """The chunk of the rank at `tp_index`."""
        dim = self.dim % len(shape)
        start, stop = chunk(self._padded(shape[dim]), 1, tp_index, tp)
        held = range(min(start, shape[dim]), min(stop, shape[dim]))
        return TensorSlice.along(shape, dim, [held], size=stop - start)

    def _padded(self, size: int) -> int:
        return size if self.pad_to is None else -(-size // self.pad_to) * self.pad_to


def _absent_dim(shape: tuple[int, ...], dim: int) -> str | None:
    return (
        None if -len(shape) <= dim < len(shape) else f"it has {counted(len(shape), 'dimension')}, none is number {dim}"
    )


def _wrong_total(shape: tuple[int, ...], dim: int, total: int) -> str | None:
    return (
        None
        if total == shape[dim]
        else f"dimension {dim} has {counted(shape[dim], 'index', 'indices')}, but its parts make {total}"
    )


def _check_dim(owner: object, dim: int) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ShardingError(f"a dimension is a whole number: {owner!r}")
