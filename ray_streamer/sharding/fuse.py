"""Which tensors lie one after the other in one result? Projections that an engine keeps fused, each rank's shares of them.

    q_proj.weight, k_proj.weight, v_proj.weight  ->  qkv_proj.weight: the rank's queries, then its keys, then its values

Every slice becomes boxes of the fused result, so that its bytes go there at once: nothing is joined afterwards. All tensors of
a module are fused along what counts its outputs: weights, biases, scales by channel or block, packed words. Scales of a whole
weight become one slot each. What does not count outputs and is no single number (`g_idx`, `weight_shape`) stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.quantization import stored_forms
from ray_streamer.sharding.result_table import ResultTable
from ray_streamer.sharding.slices import Box, SliceTable, TensorSlice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.slices import SlicePattern
    from ray_streamer.sharding.stored_form import StoredForm

Fusions = dict[str, tuple[str, ...]]

FuseLike = bool | Mapping[str, Any]
"""What people write: True for `STANDARD_FUSIONS`, or fused module's name -> names of its modules, in order."""

STANDARD_FUSIONS: Fusions = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused where a model has all of the modules."""


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


def checked_fusions(fuse: Any) -> Fusions:
    """The fusions that `fuse` asks for.

    Raises:
        ShardingError: They are no mapping of names to several names.
    """
    if isinstance(fuse, bool):
        return STANDARD_FUSIONS if fuse else {}
    if not isinstance(fuse, Mapping):
        raise ShardingError(
            f'fuse is True, or a mapping such as {{"qkv_proj": ("q_proj", "k_proj", "v_proj")}}, got {fuse!r}'
        )
    for fused, modules in fuse.items():
        if isinstance(modules, str) or len(modules) < 2 or len(set(modules)) < len(modules):
            raise ShardingError(f"fuse[{fused!r}] needs two or more modules, each of another name, got {modules!r}")
    members = [module for modules in fuse.values() for module in modules]
    if len(set(members)) < len(members):
        raise ShardingError(f"fuse names a module twice: {sorted(members)}")
    return {fused: tuple(modules) for fused, modules in fuse.items()}


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
