"""How does one tensor lie on the tp axis? Each kind of placement is a small value that answers twice.

First `refusal`: why this shape cannot be placed on so many ranks, if so; then `slice_of`: the part that one of them
holds. Names, dtypes and the other axes of the mesh do not appear here. Which placement a tensor has is the business of
the rules.

The conventions are those of Megatron-LM and of vLLM 0.33 (`vllm/model_executor/layers/linear.py`), which agree on whole
heads, on shared key-value heads and on fused projections; the vocabulary is cut as transformers 5.23 cuts it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.slices import TensorSlice


class Placement(ABC):
    """What is common to all: two pure questions. Subclasses are frozen and hashable."""

    __slots__ = ()

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be placed on `tp` ranks, or None when it can."""
        return None

    @abstractmethod
    def slice_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice | None:
        """What the rank at `tp_index` holds of a tensor of `shape`; None when nothing.

        Only for shapes that `refusal` lets pass.
        """


@dataclass(frozen=True, slots=True)
class Replicate(Placement):
    """Every rank holds the whole tensor."""

    def slice_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """All of it."""
        return TensorSlice.whole(shape)


@dataclass(frozen=True, slots=True)
class Skip(Placement):
    """No rank holds the tensor; not a byte of it is read."""

    def slice_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> None:
        """Nothing of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of indices that is split among the ranks on its own: evenly, or on whole attention heads.

    Attributes:
        size: Indices in the part.
        heads: The part is this many heads of equal size; each rank holds as many whole ones as the others.
        kv_heads: The same, but fewer heads than ranks are shared: each head is then held by tp / kv_heads neighbouring
            ranks, as grouped-query attention needs it for keys and values.

    Raises:
        ShardingError: A number is out of range, or `heads` and `kv_heads` are both given.
    """

    size: int
    heads: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        _check_heads(self, self.heads, self.kv_heads)
        if not _is_count(self.size, least=0):
            raise ShardingError(f"a part needs a size of at least 0: {self!r}")

    def refusal(self, tp: int) -> str | None:
        """Why this part cannot be split over `tp` ranks, or None when it can."""
        heads = self.heads or self.kv_heads
        if heads and self.size % heads:
            return f"{self.size} indices are not {heads} heads of equal size"
        if self.kv_heads and tp % self.kv_heads and self.kv_heads % tp:
            return f"{self.kv_heads} key-value heads neither divide among nor share out over tp={tp}"
        if self.heads and self.heads % tp:
            return f"{self.heads} heads do not divide among tp={tp}"
        return f"{self.size} indices do not divide among tp={tp}" if not heads and self.size % tp else None

    def range_of(self, tp_index: int, tp: int) -> tuple[int, int]:
        """First index and one past the last that the rank at `tp_index` holds, counted within the part.

        >>> [Part(8, kv_heads=2).range_of(index, 4) for index in range(4)]
        [(0, 4), (0, 4), (4, 8), (4, 8)]
        """
        if self.kv_heads and self.kv_heads < tp:
            width = self.size // self.kv_heads
            start = width * (tp_index // (tp // self.kv_heads))
        else:
            width = self.size // tp
            start = width * tp_index
        return start, start + width


@dataclass(frozen=True, slots=True)
class Split(Placement):
    """Each rank holds an equal share of one dimension.

    >>> Split(0, parts=(4, 2)).slice_of((6, 8), tp_index=1, tp=2).boxes  # doctest: +NORMALIZE_WHITESPACE
    (Box(starts=(2, 0), stops=(4, 8), lands=(0, 0)),
     Box(starts=(5, 0), stops=(6, 8), lands=(2, 0)))

    Attributes:
        dim: Dimension of the checkpoint's tensor; negative counts from the last.
        heads: The dimension is this many attention heads; only whole heads are cut off.
        kv_heads: The same for keys and values; fewer heads than ranks are shared, see `Part`.
        parts: A fused tensor: sizes (or `Part`s) of the sub-blocks that make up the dimension, such as the q, k and v
            of a fused projection. Each one is split on its own, and a rank's shares lie one after the other in its
            result.

    Raises:
        ShardingError: A number is out of range, or more than one of `heads`, `kv_heads` and `parts` is given.
    """

    dim: int
    heads: int | None = None
    kv_heads: int | None = None
    parts: tuple[int | Part, ...] = ()

    def __post_init__(self) -> None:
        _check_dim(self, self.dim)
        _check_heads(self, self.heads, self.kv_heads)
        if not isinstance(self.parts, tuple):
            raise ShardingError(f"parts are a tuple of sizes, such as (4096, 1024, 1024): {self!r}")
        if self.parts and (self.heads or self.kv_heads):
            raise ShardingError(f"a split in parts has the heads in its parts, not beside them: {self!r}")
        for part in self.parts:
            if not isinstance(part, Part):
                Part(part)

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp` ranks, or None when it can."""
        if absent := _absent_dim(shape, self.dim):
            return absent
        dim = self.dim % len(shape)
        parts = self._parts_of(shape[dim])
        total = sum(part.size for part in parts)
        if total != shape[dim]:
            return f"dimension {dim} has {shape[dim]} indices, but its parts make {total}"
        refusals = (part.refusal(tp) for part in parts)
        return next((f"dimension {dim}: {refusal}" for refusal in refusals if refusal), None)

    def slice_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """The share of the rank at `tp_index`."""
        dim = self.dim % len(shape)
        ranges: list[tuple[int, int]] = []
        offset = 0
        for part in self._parts_of(shape[dim]):
            start, stop = part.range_of(tp_index, tp)
            ranges.append((offset + start, offset + stop))
            offset += part.size
        return TensorSlice.parts(shape, dim=dim, parts=tuple(ranges))

    def _parts_of(self, size: int) -> tuple[Part, ...]:
        if not self.parts:
            return (Part(size, self.heads, self.kv_heads),)
        return tuple(part if isinstance(part, Part) else Part(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class SplitVocabulary(Placement):
    """Each rank holds a chunk of the vocabulary; the last ranks' chunks may be shorter, or empty.

    Chunks have ceil(size / tp) indices as long as there are any: the rule of `torch.chunk`, and of transformers 5.23
    for embeddings and heads. Nothing is padded.

    >>> [SplitVocabulary().slice_of((9, 4), tp_index=index, tp=4).shape for index in range(4)]
    [(3, 4), (3, 4), (3, 4), (0, 4)]
    """

    dim: int = 0

    def __post_init__(self) -> None:
        _check_dim(self, self.dim)

    def refusal(self, shape: tuple[int, ...], tp: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp` ranks, or None when it can."""
        return _absent_dim(shape, self.dim)

    def slice_of(self, shape: tuple[int, ...], *, tp_index: int, tp: int) -> TensorSlice:
        """The chunk of the rank at `tp_index`."""
        dim = self.dim % len(shape)
        chunk = -(-shape[dim] // tp)
        start = min(tp_index * chunk, shape[dim])
        return TensorSlice.along(shape, dim=dim, start=start, stop=min(start + chunk, shape[dim]))


def _absent_dim(shape: tuple[int, ...], dim: int) -> str | None:
    return None if -len(shape) <= dim < len(shape) else f"it has {len(shape)} dimensions, none is number {dim}"


def _check_dim(owner: object, dim: int) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ShardingError(f"a dimension is a whole number: {owner!r}")


def _check_heads(owner: object, heads: int | None, kv_heads: int | None) -> None:
    if heads is not None and kv_heads is not None:
        raise ShardingError(f"heads and kv_heads exclude each other: {owner!r}")
    if not all(count is None or _is_count(count, least=1) for count in (heads, kv_heads)):
        raise ShardingError(f"a number of heads must be at least 1: {owner!r}")


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
