"""What do rules say that one rank holds? A slice source: called with an index and a rank, in whichever process plans.

index ─> kinds of names ─> groups of tensors ─> destinations        once per index, whatever the rank
destinations + position of the rank in the mesh ─> rank slices      tens of patterns, and columns that are gathered
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ray_streamer.arguments import check_choice
from ray_streamer.checkpoint.base_model import adapter_config_of
from ray_streamer.collector import collector_paused
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding.cast import DTypeLike, checked_dtypes
from ray_streamer.sharding.completeness import refuse_absent
from ray_streamer.sharding.destinations import find_destinations
from ray_streamer.sharding.families import family_of
from ray_streamer.sharding.fuse import FuseLike, checked_fusions
from ray_streamer.sharding.groups import DEFAULT_UNMATCHED, Unmatched
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.name_kinds import kinds_of_tensors
from ray_streamer.sharding.presets import DEFAULT_LAYOUT, Layout
from ray_streamer.sharding.rename import RenameLike, kept_renaming
from ray_streamer.sharding.resolve import checked_groups
from ray_streamer.sharding.rules import ShardRules
from ray_streamer.slices.rank_slices import RankSlices
from ray_streamer.slices.result import ResultSpecs
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.destinations import Destinations, RankMoves
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.families import Family
    from ray_streamer.sharding.mesh import MeshPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSlices:
    """Slices from rules: the caller's first, then the preset of the checkpoint's config.json. A `SliceSource`.

    Where nothing is to be cut (tp, pp and ep are 1), a model of no known family is held whole, but for what the caller's rules skip.
    What does not depend on the rank is worked out at the first call with an index and kept as long as the index lives; ranks that
    hold the same get the same object. Pickled without it.

    >>> from ray_streamer.sharding import Split
    >>> source = RuleSlices(mesh=Mesh(tp=2), rules=ShardRules({"*.up_proj.weight": Split(0)}), dtype="bfloat16")

    Attributes:
        mesh: The grid of ranks.
        rules: The caller's; whatever makes `ShardRules`, such as a mapping.
        unmatched: What becomes of tensors of two or more dimensions that no rule matches.
        layout: What the tensors are for, and so which preset.
        mtp: Whether the layers for multi-token prediction (MTP) are loaded, too.
        stage_layers: Layers of each stage; as even as can be when unset.
        experts: Experts of each group, for all layers or by layer; neighbours when unset.
        fuse: Which modules' tensors land in common results.
        rename: What results are called; the checkpoint's names when unset.
        dtype: What results are cast to; nothing when unset.

    Raises:
        SettingsError: `mesh` is no `Mesh`, or `unmatched` or `layout` is none of its values.
        ShardingError: `rules`, `fuse`, `rename` or `dtype` cannot mean anything.
    """

    mesh: Mesh = field(default_factory=Mesh)
    rules: ShardRules = field(default_factory=ShardRules)
    unmatched: Unmatched = DEFAULT_UNMATCHED
    layout: Layout = DEFAULT_LAYOUT
    mtp: bool = False
    stage_layers: tuple[int, ...] | None = None
    experts: ExpertsLike | None = None
    fuse: FuseLike = False
    rename: RenameLike | None = None
    dtype: DTypeLike = None
    _kept: WeakKeyDictionary[CheckpointIndex, _RankTable] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise SettingsError(f"mesh is a ray_streamer.Mesh, such as Mesh(tp=8), got {type(self.mesh).__name__}")
        object.__setattr__(self, "rules", ShardRules(self.rules))
        check_choice("unmatched", self.unmatched, Unmatched)
        check_choice("layout", self.layout, Layout)
        if self.experts is not None and self.mesh.ep == 1:
            raise SettingsError(
                f"experts={brief(self.experts)} divides experts over groups of ranks; give ep=True, too"
            )
        checked_fusions(self.fuse)
        if self.rename is not None:
            # An iterator could be asked once only.
            object.__setattr__(self, "rename", kept_renaming(self.rename))
        if self.dtype is not None:
            checked_dtypes(self.dtype)

    @property
    def as_arguments(self) -> dict[str, str]:
        """As a caller writes them, but for `mesh`: equal texts on ranks that hold parts of one model. Functions are not told apart."""
        return {
            "rules": repr([(rule.glob, rule.placement) for rule in self.rules.rules]),
            "unmatched": self.unmatched,
            "layout": self.layout,
            "mtp": str(self.mtp),
            "pp": str(self.stage_layers),
            "experts": repr(self.experts),
            "fuse": repr(checked_fusions(self.fuse)),
            "rename": "a function" if callable(self.rename) else repr(self.rename),
            "dtype": repr(None if self.dtype is None else checked_dtypes(self.dtype)),
        }

    @collector_paused()
    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """What `rank` holds of the checkpoint.

        Raises:
            SettingsError: The mesh has no such rank.
            ShardingError: The config names no known family, a tensor has no rule, tensors cannot be cut or fused so on some rank,
                or two results would have one name.
        """
        at = self.mesh.position(rank)
        table = self._kept.get(index)
        if table is None:
            table = self._kept[index] = self._resolve(index)
        return table.slices_at(at)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves out what can be worked out again."""
        return _made_again, ({spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init},)

    def _resolve(self, index: CheckpointIndex) -> _RankTable:
        rules, unmatched = self._placements(index)
        refuse_absent(index, rules)
        names = kinds_of_tensors(index)
        grouped = checked_groups(
            index,
            names,
            rules,
            self.mesh,
            unmatched=unmatched,
            stage_layers=self.stage_layers,
            experts=self.experts,
        )
        destinations = find_destinations(
            index, names, grouped, self.mesh, fuse=self.fuse, rename=self.rename, dtype=self.dtype
        )
        return _RankTable(self.mesh, destinations)

    def _placements(self, index: CheckpointIndex) -> tuple[ShardRules, Unmatched]:
        """The rules for a checkpoint, and what becomes of matrices that none matches."""
        is_unknown = family_of(index.config or {}) is None
        if is_unknown and self.layout == DEFAULT_LAYOUT and (self.mesh.tp, self.mesh.pp, self.mesh.ep) == (1, 1, 1):
            # Every rank holds all of it: nobody needs to know how the model is cut.
            return self.rules, "replicate"
        return self.rules_for(index), self.unmatched

    def rules_for(self, index: CheckpointIndex) -> ShardRules:
        """The caller's rules, and after them those of the model, or of the adapter.

        Raises:
            ShardingError: The model is unknown, and the caller's rules do not replace its own.
        """
        family = family_of(index.config or {})
        if (adapter := adapter_config_of(index.config)) is not None:
            return self.rules + self._adapter_rules(index, adapter, family)
        try:
            return ShardRules.for_config(index.config, first=self.rules, layout=self.layout, mtp=self.mtp)
        except ShardingError as error:
            hint = self._advice(index) if family is None else ""
            raise ShardingError(f"{index.uri}: {error}{hint}") from error

    def _advice(self, index: CheckpointIndex) -> str:
        from ray_streamer.sharding.lookalikes import advice

        return advice(index, layout=self.layout)

    def _adapter_rules(self, index: CheckpointIndex, adapter: Mapping[str, Any], family: Family | None) -> ShardRules:
        """Those of an adapter; none where only the caller's can place it."""
        if self.fuse:
            raise ShardingError(
                f"{index.uri}: fuse joins modules of a model, and not the factors of an adapter; leave it out"
            )
        if family is None and len(self.rules):
            return ShardRules()
        if family is None:
            raise ShardingError(
                f"{index.uri}: an adapter of {brief(adapter.get('base_model_name_or_path'))}, of whose config no known model type "
                "could be read: put the base model's config.json beside adapter_config.json, or give rules"
            )
        from ray_streamer.sharding.adapter import adapter_rules

        base = ShardRules.for_config(index.config, layout=self.layout, mtp=self.mtp)
        return adapter_rules(index, adapter, base, family=family)


def _made_again(values: dict[str, Any]) -> RuleSlices:
    return RuleSlices(**values)


@dataclass(frozen=True, slots=True, eq=False)
class _RankTable:
    """What ranks hold, by their position; columns that are equal on several ranks are one array."""

    mesh: Mesh
    destinations: Destinations
    _known: dict[MeshPosition, RankSlices] = field(default_factory=dict)
    _shared: dict[Hashable, Any] = field(default_factory=dict)

    def slices_at(self, at: MeshPosition) -> RankSlices:
        """What ranks at this position hold."""
        if at not in self._known:
            self._known[at] = self._gather([each.on(self.mesh, at) for each in self.destinations.distinct])
        return self._known[at]

    def _gather(self, moves: Sequence[RankMoves | None]) -> RankSlices:
        patterns, pattern_numbers = _numbered([each.pattern if each else None for each in moves])
        forms, form_numbers = _numbered([each.form if each else None for each in moves])
        offsets = np.array([each.offset if each else 0 for each in moves], dtype=np.int64)
        is_held = pattern_numbers >= 0
        tensor_ids, result_ids, kept = self._once(("rows", is_held.tobytes()), lambda: self._rows(is_held))
        rows = self.destinations.ids[tensor_ids]
        return RankSlices(
            results=self._results(is_held, result_ids, kept, tuple(forms), form_numbers, rows),
            patterns=tuple(patterns),
            tensor_ids=tensor_ids,
            result_ids=result_ids,
            pattern_ids=self._column("patterns", is_held, pattern_numbers, rows),
            target_offsets=self._column("offsets", is_held, offsets, rows),
        )

    def _rows(self, is_held: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
        """Held tensors, the position of each one's result among the rank's, and which of all results are the rank's."""
        tensor_ids = np.flatnonzero(is_held[self.destinations.ids]).astype(np.int32)
        results = self.destinations.result_ids[tensor_ids]
        is_kept = np.zeros(len(self.destinations.names), dtype=bool)
        is_kept[results] = True
        return tensor_ids, (np.cumsum(is_kept, dtype=np.int32) - 1)[results].astype(np.int32), is_kept

    def _results(
        self,
        is_held: NDArray[np.bool_],
        result_ids: NDArray[np.int32],
        is_kept: NDArray[np.bool_],
        forms: tuple[Any, ...],
        form_numbers: NDArray[np.int32],
        rows: NDArray[np.int32],
    ) -> ResultSpecs:
        def make() -> ResultSpecs:
            names = self.destinations.names
            if not is_kept.all():
                names = tuple(map(names.__getitem__, np.flatnonzero(is_kept).tolist()))
            form_ids = np.empty(len(names), dtype=np.int32)
            # Tensors that share a result agree on its form.
            form_ids[result_ids] = form_numbers[rows]
            return ResultSpecs(names, forms, form_ids)

        return self._once(("results", is_held.tobytes(), forms, form_numbers.tobytes()), make)

    def _column(
        self, name: str, is_held: NDArray[np.bool_], values: NDArray[Any], rows: NDArray[np.int32]
    ) -> NDArray[Any]:
        """The value of each row's destination."""
        return self._once((name, is_held.tobytes(), values.tobytes()), lambda: values[rows])

    def _once(self, key: Hashable, make: Any) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def _numbered(values: Sequence[Any]) -> tuple[list[Any], NDArray[np.int32]]:
    """The distinct values, and for each value its position among them; -1 for None."""
    ids: dict[Any, int] = {}
    numbers = [-1 if value is None else ids.setdefault(value, len(ids)) for value in values]
    return list(ids), np.array(numbers, dtype=np.int32)
