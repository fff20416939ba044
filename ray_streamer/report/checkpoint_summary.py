"""What does a checkpoint hold? Counts and bytes by file, dtype and placement, from its index alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.dtypes import DTYPES
from ray_streamer.errors import ShardingError
from ray_streamer.sharding import Replicate, RuleSlices, Skip, Split, SplitVocabulary, legal_tp
from ray_streamer.sharding.completeness import missing_parts
from ray_streamer.sharding.lookalikes import lookalikes
from ray_streamer.sharding.name_kinds import kinds_of_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Tensors that have something in common.

    Attributes:
        name: What they have in common: a file, a dtype, a way to lie.
        num_tensors: How many there are.
        num_bytes: Their bytes.
    """

    name: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSize:
    """One tensor's name, dtype, logical shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """A checkpoint in figures.

    Attributes:
        uri: Its folder.
        model_type: As config.json says; None when it does not.
        checkpoint_bytes: Bytes of all tensors.
        num_tensors: How many there are.
        fingerprint: Hash of names, shapes, extents and files' identities.
        files: Shard files, by path; bytes are those of tensors.
        dtypes: The largest first.
        placements: How rules and the preset for this model lay the tensors out, the largest first; empty where there are none.
        legal_tp: Values of tp that work so; empty where there are no rules.
        largest: The largest tensors.
        lookalikes: Model types whose preset would fit, where there is none for this one.
        num_results: Tensors that a single rank would hold; None unless fuse, rename or dtype make them other tensors.
        results: The largest of those.
        missing: What config.json and the other tensors lead one to expect beside these; see `sharding.completeness`.
    """

    uri: str
    model_type: str | None
    checkpoint_bytes: int
    num_tensors: int
    fingerprint: str
    files: tuple[Share, ...]
    dtypes: tuple[Share, ...]
    placements: tuple[Share, ...]
    legal_tp: tuple[int, ...]
    largest: tuple[TensorSize, ...]
    lookalikes: tuple[str, ...] = ()
    num_results: int | None = None
    results: tuple[TensorSize, ...] = ()
    missing: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarize_checkpoint(index: CheckpointIndex, *, top: int, slices: RuleSlices) -> CheckpointSummary:
    """The figures of a checkpoint, with its `top` largest tensors.

    Args:
        index: What the headers say.
        top: How many tensors are shown.
        slices: How tensors are laid out, and into which results they go; its mesh has one rank.

    Raises:
        ShardingError: What `slices` asks for does not fit the checkpoint.
    """
    sizes = index.stops - index.starts
    placements, tp_sizes = _placements(index, sizes, slices)
    num_results, results = _results(index, slices, top)
    # Equal sizes in the order of the files, so that the same checkpoint always gives the same list.
    largest = np.argsort(-sizes, kind="stable")[:top].tolist()
    model_type = (index.config or {}).get("model_type")
    return CheckpointSummary(
        uri=index.uri,
        model_type=model_type if isinstance(model_type, str) else None,
        checkpoint_bytes=index.total_bytes,
        num_tensors=len(index),
        fingerprint=index.fingerprint(),
        files=_shares([file.path for file in index.files], index.file_ids, sizes),
        dtypes=_largest_first(_shares([dtype.name for dtype in DTYPES], index.dtype_codes, sizes)),
        placements=placements,
        legal_tp=tp_sizes,
        largest=tuple(
            TensorSize(
                name=index.names[position],
                dtype=index.dtype_of(position).name,
                shape=index.shape_of(position),
                num_bytes=int(sizes[position]),
            )
            for position in largest
        ),
        lookalikes=() if placements else tuple(lookalikes(index, layout=slices.layout)),
        num_results=num_results,
        results=results,
        missing=_missing(index),
    )


def _missing(index: CheckpointIndex) -> tuple[str, ...]:
    try:
        return tuple(missing_parts(index)) if index.found_by != "name" else ()
    except ShardingError as error:
        return (str(error),)


def _results(index: CheckpointIndex, slices: RuleSlices, top: int) -> tuple[int | None, tuple[TensorSize, ...]]:
    """How many results there are, and the largest."""
    if slices.fuse is False and slices.rename is None and slices.dtype is None:
        return None, ()
    results = slices(index, 0).results
    sizes = [
        TensorSize(
            name=result.name,
            dtype=result.dtype,
            shape=result.shape,
            num_bytes=prod(result.shape) * result.stored.num_bits // 8,
        )
        for result in results
    ]
    return len(sizes), tuple(sorted(sizes, key=lambda size: -size.num_bytes)[:top])


def _placements(
    index: CheckpointIndex, sizes: NDArray[np.int64], slices: RuleSlices
) -> tuple[tuple[Share, ...], tuple[int, ...]]:
    try:
        rules = slices.rules_for(index)
    except ShardingError:
        if slices != RuleSlices():
            raise
        return (), ()
    kinds = [_kind_of(rule.placement) for rule in rules]
    names = sorted({*kinds, "replicated", "no rule"})
    codes = [names.index(kind) for kind in kinds]
    unplaced = "replicated" if slices.unmatched == "replicate" else "no rule"
    without = np.where(index.num_dims >= 2, names.index(unplaced), names.index("replicated"))
    matches = rules.first_matches(kinds_of_tensors(index))
    tensor_codes = np.where(matches >= 0, np.array(codes)[matches], without)
    return _largest_first(_shares(names, tensor_codes, sizes)), legal_tp(index, rules, unmatched="replicate")


def _kind_of(placement: Placement) -> str:
    match placement:
        case Split(dim=0):
            return "split, dimension 0 (column-parallel)"
        case Split(dim=1):
            return "split, dimension 1 (row-parallel)"
        case SplitVocabulary():
            return "split vocabulary"
        case Replicate():
            return "replicated"
        case Skip():
            return "skipped"
        case _:
            return repr(placement)


def _shares(names: Sequence[str], codes: NDArray[Any], sizes: NDArray[np.int64]) -> tuple[Share, ...]:
    """One share for each name that any tensor has; `codes` are positions in `names`."""
    counts = np.bincount(codes, minlength=len(names))
    # Weights are added as doubles: exact up to 2**53 bytes.
    num_bytes = np.bincount(codes, weights=sizes, minlength=len(names))
    return tuple(
        Share(name=name, num_tensors=int(count), num_bytes=int(total))
        for name, count, total in zip(names, counts, num_bytes, strict=True)
        if count
    )


def _largest_first(shares: tuple[Share, ...]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda share: (-share.num_bytes, share.name)))
