"""Which tensors lie one after the other in one result? Projections that an engine keeps fused, each rank's shares of them.

    q_proj.weight, k_proj.weight, v_proj.weight  ->  qkv_proj.weight: the rank's queries, then its keys, then its values

Every slice lands in the fused result at once: nothing is joined afterwards. All tensors of a module are fused along what counts its
outputs: weights, biases, scales by channel or block, packed words. Scales of a whole weight become one slot each. What does not count
outputs and is no single number (`g_idx`, `weight_shape`) stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct, distinct_rows
from ray_streamer.sharding.fusion import Fusion
from ray_streamer.sharding.name_kinds import NameKinds, number_of
from ray_streamer.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.groups import TensorGroups
    from ray_streamer.sharding.stored_form import StoredForm

Fusions = dict[str, tuple[str, ...]]

FuseLike = bool | Mapping[str, Any]
"""What people write: True for `STANDARD_FUSIONS`, or fused module's name -> names of its modules, in order."""

STANDARD_FUSIONS: Fusions = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused where a model has all of the modules."""


@dataclass(frozen=True, slots=True, eq=False)
class FusedTensors:
    """Which tensors of a checkpoint share results.

    Attributes:
        fusions: What is common to such results.
        fusion_ids: For each tensor the position in `fusions`; -1 when it has a result of its own.
        places: For each tensor its place among those that share its result; 0 for others.
        leaders: For each tensor the first that lands in the same result; itself for others.
        names: Leader -> the result's name.
    """

    fusions: tuple[Fusion, ...]
    fusion_ids: NDArray[np.int64] = field(repr=False)
    places: NDArray[np.int64] = field(repr=False)
    leaders: NDArray[np.int64] = field(repr=False)
    names: Mapping[int, str] = field(repr=False)


def find_fused(index: CheckpointIndex, names: NameKinds, grouped: TensorGroups, fuse: FuseLike) -> FusedTensors:
    """The tensors that `fuse` asks to share results.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        grouped: How they lie.
        fuse: What is asked for.

    Raises:
        ShardingError: A fusion that was asked for has no modules; or its modules do not fit together, in which tensors they
            have, dtypes or shapes.
    """
    fusions = checked_fusions(fuse)
    fused = FusedTensors(
        (),
        np.full(len(index), -1, dtype=np.int64),
        np.zeros(len(index), dtype=np.int64),
        np.arange(len(index)),
        {},
    )
    if not fusions:
        return fused
    if any(number_of(module) is not None for modules in fusions.values() for module in modules):
        names = NameKinds.each_its_own(names.names)
    found = _find_members(names, fusions)
    members = _complete_members(index, found, fusions, is_standard=fuse is True)
    form_ids = grouped.quantized.forms_by_tensor(len(index))
    # Absent members of shorter fusions are -1 in every column.
    columns = [np.where(column >= 0, ids[column], -1) for column in members.T for ids in (grouped.ids, form_ids)]
    alike = distinct_rows(columns)
    kinds: list[Fusion] = []
    kind_ids = np.full(len(alike.firsts), -1, dtype=np.int64)
    for kind, example in enumerate(alike.firsts.tolist()):
        tensors = [tensor for tensor in members[example].tolist() if tensor >= 0]
        forms = [grouped.quantized.forms[form] if (form := form_ids[tensor]) >= 0 else None for tensor in tensors]
        dim = _fused_dim(index, tensors, forms)
        if dim is not None:
            name = found.name_of(tensors[0])
            _check_alike(index, name, tensors, dim)
            kind_ids[kind] = len(kinds)
            groups = tuple(grouped.groups[grouped.ids[tensor]] for tensor in tensors)
            kinds.append(Fusion(name=name, dim=dim, members=groups, forms=tuple(forms)))
    return _by_tensor(fused, tuple(kinds), members, kind_ids[alike.ids], found)


def _by_tensor(
    alone: FusedTensors,
    fusions: tuple[Fusion, ...],
    members: NDArray[np.int64],
    fusion_ids: NDArray[np.int64],
    found: _Members,
) -> FusedTensors:
    """The rows of `members`, each of which shares a result by its fusion, as columns of tensors; those with -1 stay alone."""
    members, fusion_ids = members[fusion_ids >= 0], fusion_ids[fusion_ids >= 0]
    rows, places = np.nonzero(members >= 0)
    tensors, leaders = members[rows, places], members[rows].min(axis=1, initial=1 << 62, where=members[rows] >= 0)
    alone.fusion_ids[tensors] = fusion_ids[rows]
    alone.places[tensors] = places
    alone.leaders[tensors] = leaders
    names = {leader: found.name_of(leader) for leader in distinct(leaders).tolist()}
    return FusedTensors(fusions, alone.fusion_ids, alone.places, alone.leaders, names)


def checked_fusions(fuse: Any) -> Fusions:
    """The fusions that `fuse` asks for.

    Raises:
        ShardingError: They are no mapping of names to several names in their order.
    """
    if isinstance(fuse, bool):
        return STANDARD_FUSIONS if fuse else {}
    if not isinstance(fuse, Mapping):
        raise ShardingError(
            f'fuse is True, or a mapping such as {{"qkv_proj": ("q_proj", "k_proj", "v_proj")}}, got {fuse!r}'
        )
    for fused, modules in fuse.items():
        if not _is_name(fused):
            raise ShardingError(f"fuse names results, each by a text, got {fused!r}")
        is_list = isinstance(modules, Sequence) and not isinstance(modules, str) and all(map(_is_name, modules))
        if not is_list or len(modules) < 2 or len(set(modules)) < len(modules):
            raise ShardingError(
                f"fuse[{fused!r}] needs a list of two or more modules in their order, each of another name, got {modules!r}"
            )
    members = [module for modules in fuse.values() for module in modules]
    if len(set(members)) < len(members):
        raise ShardingError(f"fuse names a module twice: {sorted(members)}")
    return {fused: tuple(modules) for fused, modules in fuse.items()}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


class _Place(NamedTuple):
    """Where a kind of names has a module that is fused: which component, of which fusion, which of its modules."""

    component: int
    fused: str
    place: int


@dataclass(frozen=True, slots=True, eq=False)
class _Members:
    """Tensors of modules that are fused; one row for each.

    Attributes:
        names: Of all tensors of the index.
        place_of_kind: For kinds of names that have such a module.
        tensors: Position in the index, in order.
        places: Which of the fusion's modules.
        modules: Position of the fused module; modules are numbered in order of their first tensor.
        results: Position of what would be one result, numbered likewise.
    """

    names: NameKinds
    place_of_kind: dict[int, _Place]
    tensors: NDArray[np.int64]
    places: NDArray[np.int64]
    modules: NDArray[np.int64]
    results: NDArray[np.int64]

    def place_of(self, tensor: int) -> _Place:
        """Where the tensor's name has the module."""
        return self.place_of_kind[int(self.names.kind_ids[tensor])]

    def name_of(self, tensor: int) -> str:
        """The name of the result that the tensor would land in."""
        at = self.place_of(tensor)
        components = self.names.names[tensor].split(".")
        return ".".join((*components[: at.component], at.fused, *components[at.component + 1 :]))

    def module_of(self, tensor: int, module: str) -> str:
        """The name of the module called `module` beside that of the tensor."""
        return ".".join((*self.names.names[tensor].split(".")[: self.place_of(tensor).component], module))


def _find_members(names: NameKinds, fusions: Fusions) -> _Members:
    modules = {module: (fused, place) for fused, found in fusions.items() for place, module in enumerate(found)}
    place_of_kind: dict[int, _Place] = {}
    module_ids: dict[Any, int] = {}
    result_ids: dict[Any, int] = {}
    rows = np.full((len(names.kinds), 4), -1, dtype=np.int64)
    for kind_id, kind in enumerate(names.kinds):
        at = next((at for at, component in enumerate(kind) if component in modules), None)
        if at is not None:
            fused, place = modules[kind[at] or ""]
            place_of_kind[kind_id] = _Place(at, fused, place)
            module = module_ids.setdefault((kind[:at], fused), len(module_ids))
            result = result_ids.setdefault((kind[:at], fused, kind[at + 1 :]), len(result_ids))
            rows[kind_id] = place, module, result, kind[:at].count(None)
    places, module_of, result_of, num_before = rows[names.kind_ids].T
    tensors = np.flatnonzero(places >= 0)
    numbers = names.numbers[tensors].astype(np.int64)
    is_before = np.arange(numbers.shape[1]) < num_before[tensors, None]
    return _Members(
        names=names,
        place_of_kind=place_of_kind,
        tensors=tensors,
        places=places[tensors],
        modules=distinct_rows([module_of[tensors], *np.where(is_before, numbers, -1).T]).ids,
        results=distinct_rows([result_of[tensors], *numbers.T]).ids,
    )


def _complete_members(
    index: CheckpointIndex, found: _Members, fusions: Fusions, *, is_standard: bool
) -> NDArray[np.int64]:
    """For each result its tensors in order of their modules, then -1.

    Modules that a model lacks are no fault of a standard fusion, which then does nothing.
    """
    width = max(map(len, fusions.values()))
    num_modules, num_results = (int(ids.max(initial=-1)) + 1 for ids in (found.modules, found.results))
    present = np.full((num_modules, width), -1, dtype=np.int64)
    present[found.modules, found.places] = found.tensors
    members = np.full((num_results, width), -1, dtype=np.int64)
    members[found.results, found.places] = found.tensors
    module_of_result = np.empty(num_results, dtype=np.int64)
    module_of_result[found.results] = found.modules
    fused_of_module = [found.place_of(int(row.max())).fused for row in present]
    wanted = np.array([len(fusions[fused]) for fused in fused_of_module], dtype=np.int64)
    is_complete = (present >= 0).sum(axis=1) == wanted
    for module in [] if is_standard else np.flatnonzero(~is_complete).tolist():
        modules, example = fusions[fused_of_module[module]], int(present[module].max())
        absent = next(name for place, name in enumerate(modules) if present[module, place] < 0)
        raise ShardingError(
            f"{index.uri}: {found.module_of(example, fused_of_module[module])} cannot be fused: there is no "
            f"{found.module_of(example, absent)}"
        )
    members, module_of_result = members[is_complete[module_of_result]], module_of_result[is_complete[module_of_result]]
    for row in np.flatnonzero((members >= 0).sum(axis=1) < wanted[module_of_result]).tolist():
        modules, example = fusions[fused_of_module[module_of_result[row]]], int(members[row].max())
        absent = next(name for place, name in enumerate(modules) if members[row, place] < 0)
        behind = index.names[example].split(".")[found.place_of(example).component + 1 :]
        raise ShardingError(
            f"{index.uri}: {found.name_of(example)} cannot be fused: there is {index.names[example]}, but no "
            f"{'.'.join((found.module_of(example, absent), *behind))}"
        )
    unused = [fused for fused in fusions if fused not in fused_of_module]
    if unused and not is_standard:
        raise ShardingError(
            f"{index.uri} has none of the modules of fuse[{unused[0]!r}]: {', '.join(fusions[unused[0]])}"
        )
    return members


def _fused_dim(index: CheckpointIndex, tensors: Sequence[int], forms: Sequence[StoredForm | None]) -> int | None:
    """The dimension of the result along which the tensors lie one after the other; None when they stay apart."""
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return 0 if all(_may_count_outputs(index, tensor) for tensor in tensors) else None
    counting = [dim for form in known for dim, stored in enumerate(form.dims or ()) if stored.weight_dim == 0]
    if counting:
        return counting[0]
    is_one_for_each = all(prod(index.shape_of(tensor)) == 1 for tensor in tensors)
    return 0 if is_one_for_each or all(map(_is_row_of_blocks, known)) else None


def _is_row_of_blocks(form: StoredForm) -> bool:
    """Whether the tensor has scales by block for a part whose outputs are all in one block."""
    dims = form.dims
    if dims is None or len(dims) != len(form.weight_shape) or len(dims) < 2:
        return False
    return dims[0].weight_dim is None and all(dim.elements > 1 for dim in dims[1:])


def _may_count_outputs(index: CheckpointIndex, tensor: int) -> bool:
    """Whether a tensor may have a number for each output of its module, as a bias has: not if the weight has other outputs."""
    weight = index.find(f"{index.names[tensor].rpartition('.')[0]}.weight")
    if weight is None or len(index.shape_of(tensor)) != 1 or not index.shape_of(weight):
        return True
    return index.shape_of(tensor)[0] == index.shape_of(weight)[0]


def _check_alike(index: CheckpointIndex, name: str, tensors: Sequence[int], dim: int) -> None:
    first, *others = tensors
    if len(index.shape_of(first)) > 2:
        raise ShardingError(
            f"{index.uri}: {name} cannot be fused: it has {counted(len(index.shape_of(first)), 'dimension')}"
        )
    for other in others:
        kinds = [(index.dtype_of(tensor).name, *_others(index.shape_of(tensor), dim)) for tensor in (first, other)]
        if kinds[0] != kinds[1]:
            shown = (
                f"{index.names[at]} is {index.dtype_of(at).name} {list(index.shape_of(at))}" for at in (first, other)
            )
            raise ShardingError(f"{index.uri}: {name} cannot be fused along dimension {dim}: {', '.join(shown)}")


def _others(shape: tuple[int, ...], dim: int) -> tuple[int | None, ...]:
    return tuple(None if at == dim else size for at, size in enumerate(shape))
