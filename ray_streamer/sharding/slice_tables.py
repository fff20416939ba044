"""How are tables of all ranks fused, cast and renamed? Goes when plans are made from each rank's own slices."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.cast import CASTABLE, checked_dtypes
from ray_streamer.sharding.fuse import checked_fusions
from ray_streamer.sharding.quantization import stored_forms
from ray_streamer.sharding.rename import renaming
from ray_streamer.sharding.result_table import ResultTable
from ray_streamer.sharding.slices import Box, SliceTable, TensorSlice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.fuse import FuseLike, Fusions
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.slices import SlicePattern
    from ray_streamer.sharding.stored_form import StoredForm


def fuse_slices(index: CheckpointIndex, table: SliceTable, fuse: FuseLike) -> SliceTable:
    """The same slices, those of fused modules as boxes of common results.

    Raises:
        ShardingError: A fusion that was asked for has no modules; or its modules do not fit together, in which tensors they
            have, dtypes, shapes, ranks or blocks.
    """
    fusions = checked_fusions(fuse)
    if not fusions:
        return table
    if table.results is not None:
        raise ShardingError("the slices say themselves in which results they land; they cannot be fused again")
    groups = _find_groups(index, fusions, is_standard=fuse is True)
    forms = stored_forms(index)
    patterns = list(table.patterns)
    numbers = {pattern: number for number, pattern in enumerate(patterns)}
    pattern_ids, names = table.pattern_ids.copy(), list(index.names)
    known: dict[tuple[Any, ...], tuple[SlicePattern, ...]] = {}
    leaders: dict[int, int] = {}
    for name, tensors in groups.items():
        dim = _fused_dim(index, tensors, forms)
        if dim is None:
            continue
        _check_alike(index, name, tensors, dim)
        key = (dim, tuple(pattern_ids[tensors].tolist()), *(forms.get(tensor) for tensor in tensors))
        if key not in known:
            held = [patterns[number] for number in pattern_ids[tensors].tolist()]
            known[key] = _fused_patterns(name, held, dim, [forms.get(tensor) for tensor in tensors])
        for tensor, pattern in zip(tensors, known[key], strict=True):
            if pattern not in numbers:
                numbers[pattern] = len(patterns)
                patterns.append(pattern)
            pattern_ids[tensor] = numbers[pattern]
            leaders[tensor] = tensors[0]
        names[tensors[0]] = name
    return SliceTable(table.num_ranks, tuple(patterns), pattern_ids, _results(names, leaders))


def _find_groups(index: CheckpointIndex, fusions: Fusions, *, is_standard: bool) -> dict[str, list[int]]:
    """Fused name -> its tensors, in order of their modules."""
    places = {module: (fused, place) for fused, modules in fusions.items() for place, module in enumerate(modules)}
    modules: dict[tuple[str, str], dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for tensor, name in enumerate(index.names):
        components = name.split(".")
        at = next((at for at, component in enumerate(components) if component in places), None)
        if at is not None:
            fused, place = places[components[at]]
            prefix, suffix = ".".join(components[:at]), ".".join(components[at + 1 :])
            modules[prefix, fused][suffix][place] = tensor
    groups: dict[str, list[int]] = {}
    for (prefix, fused), by_suffix in modules.items():
        present = {place for members in by_suffix.values() for place in members}
        if len(present) < len(fusions[fused]):
            if is_standard:
                continue
            absent = next(module for place, module in enumerate(fusions[fused]) if place not in present)
            raise ShardingError(f"{index.uri}: {prefix}.{fused} cannot be fused: there is no {prefix}.{absent}")
        for suffix, members in by_suffix.items():
            name = ".".join(filter(None, (prefix, fused, suffix)))
            if len(members) < len(present):
                absent = fusions[fused][min(present - members.keys())]
                raise ShardingError(
                    f"{index.uri}: {name} cannot be fused: there is {index.names[min(members.values())]}, but no "
                    f"{prefix}.{absent}.{suffix}"
                )
            groups[name] = [members[place] for place in sorted(members)]
    unused = [fused for fused in fusions if not any(key == fused for _, key in modules)]
    if unused and not is_standard:
        raise ShardingError(
            f"{index.uri} has none of the modules of fuse[{unused[0]!r}]: {', '.join(fusions[unused[0]])}"
        )
    return groups


def _fused_dim(index: CheckpointIndex, tensors: list[int], forms: Mapping[int, StoredForm]) -> int | None:
    """The dimension of the result along which the tensors lie one after the other; None when they stay apart."""
    form = forms.get(tensors[0])
    if form is None:
        return 0
    counting = [dim for dim, stored in enumerate(form.dims or ()) if stored.weight_dim == 0]
    if counting:
        return counting[0]
    return 0 if all(prod(index.shape_of(tensor)) == 1 for tensor in tensors) else None


def _check_alike(index: CheckpointIndex, name: str, tensors: list[int], dim: int) -> None:
    first, *others = tensors
    if len(index.shape_of(first)) > 2:
        raise ShardingError(f"{index.uri}: {name} cannot be fused: it has {len(index.shape_of(first))} dimensions")
    for other in others:
        kinds = [(index.dtype_of(tensor).name, *_others(index.shape_of(tensor), dim)) for tensor in (first, other)]
        if kinds[0] != kinds[1]:
            shown = (
                f"{index.names[at]} is {index.dtype_of(at).name} {list(index.shape_of(at))}" for at in (first, other)
            )
            raise ShardingError(f"{index.uri}: {name} cannot be fused along dimension {dim}: {', '.join(shown)}")


def _others(shape: tuple[int, ...], dim: int) -> tuple[int | None, ...]:
    return tuple(None if at == dim else size for at, size in enumerate(shape))


def _fused_patterns(
    name: str, held: list[SlicePattern], dim: int, forms: list[StoredForm | None]
) -> tuple[SlicePattern, ...]:
    """For each tensor its pattern in the fused result."""
    by_rank = [_fused_parts(name, rank, parts, dim, forms) for rank, parts in enumerate(zip(*held, strict=True))]
    return tuple(zip(*by_rank, strict=True))


def _fused_parts(
    name: str, rank: int, parts: tuple[TensorSlice | None, ...], dim: int, forms: list[StoredForm | None]
) -> tuple[TensorSlice | None, ...]:
    present = [part for part in parts if part is not None]
    if not present:
        return parts
    if len(present) < len(parts):
        raise ShardingError(f"{name} cannot be fused: rank {rank} holds some of its parts and not the others")
    shapes = [part.shape or (1,) for part in present]
    if len({_others(shape, dim) for shape in shapes}) > 1 or any(part.reach != part.shape for part in present):
        raise ShardingError(f"{name} cannot be fused: the parts of rank {rank} have the shapes {shapes}, or are padded")
    for part, form in zip(present[:-1], forms[:-1], strict=True):
        _check_whole_blocks(name, part, dim, form)
    total = sum(shape[dim] for shape in shapes)
    result = tuple(total if at == dim else size for at, size in enumerate(shapes[0]))
    offsets = np.cumsum([0, *(shape[dim] for shape in shapes[:-1])]).tolist()
    return tuple(
        TensorSlice(result, tuple(_moved(part.boxes, dim, offset)))
        for part, offset in zip(present, offsets, strict=True)
    )


def _check_whole_blocks(name: str, part: TensorSlice, dim: int, form: StoredForm | None) -> None:
    """What follows must begin at a step of its own: a shorter last block may be the last of all only."""
    if form is None or not form.dims or form.dims[dim].weight_dim is None:
        return
    stored, whole = form.dims[dim], form.weight_shape[form.dims[dim].weight_dim]
    last = -(-whole * stored.steps // stored.elements)
    if whole * stored.steps % stored.elements and any(box.stops[dim] == last for box in part.boxes):
        raise ShardingError(
            f"{name} cannot be fused: {whole} indices of one part are no whole blocks of {stored.elements}"
        )


def _moved(boxes: Iterable[Box], dim: int, offset: int) -> Iterator[Box]:
    """The boxes further along `dim`; a scalar's becomes a slot in a row of them."""
    for box in boxes:
        starts, stops, lands = (box.starts, box.stops, box.lands) if box.starts else ((0,), (1,), (0,))
        yield Box(starts, stops, tuple(land + offset if at == dim else land for at, land in enumerate(lands)))


def _results(names: list[str], leaders: Mapping[int, int]) -> ResultTable:
    """One result for each tensor, but one in all for those with the same leader."""
    kept = [tensor for tensor in range(len(names)) if leaders.get(tensor, tensor) == tensor]
    number = {tensor: position for position, tensor in enumerate(kept)}
    ids = [number[leaders.get(tensor, tensor)] for tensor in range(len(names))]
    return ResultTable(tuple(names[tensor] for tensor in kept), np.array(ids, dtype=np.int32))


def cast_results(index: CheckpointIndex, table: SliceTable, dtype: DTypeLike) -> SliceTable:
    """The same slices, in results of other dtypes.

    Tensors of 16 bits and more are cast; narrower ones, integers, and all tensors of quantized weights, whose scales belong to
    what is stored, stay as they are.

    Raises:
        ShardingError: Tensors that are fused would be of different dtypes.
    """
    rules, results, quantized = checked_dtypes(dtype), table.results or ResultTable.of(index), stored_forms(index)
    chosen: dict[int, str] = {}
    for tensor, (name, result) in enumerate(zip(index.names, results.result_ids.tolist(), strict=True)):
        stored = index.dtype_of(tensor).name
        wished = next((wished for glob, wished in rules if fnmatch.fnmatchcase(name, glob)), stored)
        is_fixed = stored not in CASTABLE.values() or tensor in quantized
        if chosen.setdefault(result, stored if is_fixed else wished) != (stored if is_fixed else wished):
            raise ShardingError(f"{results.names[result]} is fused of tensors that dtype={dtype!r} casts differently")
    cast = {result: name for result, name in chosen.items()}
    for tensor, result in enumerate(results.result_ids.tolist()):
        if cast.get(result) == index.dtype_of(tensor).name:
            del cast[result]
    return replace(table, results=replace(results, casts=cast))


def rename_results(index: CheckpointIndex, table: SliceTable, rename: RenameLike) -> SliceTable:
    """The same slices, in results with other names.

    Raises:
        ShardingError: Two results would have one name, or one a name that is none; names them.
    """
    results, apply = table.results or ResultTable.of(index), renaming(rename)
    origins: dict[str, str] = {}
    for name in results.names:
        new = apply(name)
        if not isinstance(new, str) or not new:
            raise ShardingError(f"rename makes {new!r} of {name}: a name is text")
        if new in origins:
            raise ShardingError(f"rename makes {new} of both {origins[new]} and {name}")
        origins[new] = name
    return replace(table, results=replace(results, names=tuple(origins)))
