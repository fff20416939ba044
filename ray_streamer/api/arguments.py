"""What did the caller ask for? The arguments that say which part each rank holds, checked together, made one `LoadRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from ray_streamer.errors import SettingsError
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.sharding.families import check_model_type
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.rules import ShardRules
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.units import counted

if TYPE_CHECKING:
    import torch

    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.fuse import FuseLike
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.rules import RulesLike
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage import UrisLike

StagesLike = int | Sequence[int]
"""How many stages, or the number of layers of each one."""

DeviceLike = Union[str, "torch.device"]
"""A device, or its name."""

_UNSET = RuleSlices()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Which part of each tensor a rank holds, and in which results, as the caller says it.

    Every public function lists these arguments itself, with the defaults below, and passes them on as this one value.

    Attributes:
        tp: As in `load_sharded`, like all the others.
        pp: Stages.
        ep: Groups of experts.
        replicas: Copies of the model; None = as many as the ranks of the load make.
        rules: Placements by glob of names.
        slices: Who says it all, instead of rules.
        unmatched: What becomes of weights without a rule.
        layout: Which preset.
        model_type: What the model is, where config.json names a type without a preset.
        mtp: Whether MTP layers are loaded.
        experts: Experts of each group.
        fuse: Modules that share results.
        rename: Results' names.
        dtype: Results' dtypes.

    Raises:
        SettingsError: The arguments do not fit together.
    """

    tp: int | None = None
    pp: StagesLike = 1
    ep: int | bool = False
    replicas: int | None = 1
    rules: RulesLike | None = None
    slices: SliceSource | None = None
    unmatched: Unmatched = _UNSET.unmatched
    layout: Layout = _UNSET.layout
    model_type: str | None = None
    mtp: bool = _UNSET.mtp
    experts: ExpertsLike | None = _UNSET.experts
    fuse: FuseLike = _UNSET.fuse
    rename: RenameLike | None = _UNSET.rename
    dtype: DTypeLike = _UNSET.dtype

    def __post_init__(self) -> None:
        for name in ("rules", "experts", "fuse", "rename", "dtype"):
            # What the caller changes later is no part of this call.
            if type(given := getattr(self, name)) in (dict, list):
                object.__setattr__(self, name, given.copy())
        pp = self.pp
        if not isinstance(pp, int) and (not isinstance(pp, Sequence) or isinstance(pp, str) or not pp):
            raise SettingsError(
                f"pp is a number of stages, or the number of layers of each, such as (31, 30), got {pp!r}"
            )
        if self.tp is not None and (not isinstance(self.tp, int) or isinstance(self.tp, bool)):
            raise SettingsError(f"tp is a whole number of ranks, got {self.tp!r}")
        if not isinstance(self.mtp, bool):
            raise SettingsError(f"mtp is True or False, got {self.mtp!r}")
        if self.model_type is not None:
            check_model_type(self.model_type)
        if self.slices is not None:
            self._refuse_beside_slices()

    @property
    def num_stages(self) -> int:
        """Stages that `pp` asks for."""
        return self.pp if isinstance(self.pp, int) else len(self.pp)

    def request(
        self, uri: UrisLike, *, settings: Settings, device: DeviceLike, num_ranks: int | None = None
    ) -> LoadRequest:
        """The request that the arguments of a load describe.

        A local path is made absolute here, where the caller speaks: on the ranks it may mean another folder.

        Args:
            uri: The checkpoint.
            settings: Every knob.
            device: Where the tensors go.
            num_ranks: Ranks of the load, where they exist already; else as many as the arguments ask for.

        Raises:
            SettingsError: The arguments do not fit together, or `uri` is none.
            ShardingError: `rules`, `fuse`, `rename` or `dtype` cannot mean anything.
        """
        # Planning and storage are not needed to know defaults, as for the help of the command line.
        from ray_streamer.rank.request import LoadRequest

        mesh = self._mesh(num_ranks)
        named = NamedCheckpoint.of(uri, settings)
        slices = self._slice_source(mesh)
        said = slices.as_arguments if isinstance(slices, RuleSlices) else {}
        return LoadRequest(
            uri=named.uri,
            mesh=mesh,
            slices=slices,
            settings=named.settings,
            device=str(device),
            model_type=self.model_type,
            shared_arguments={"sizes": mesh.as_arguments, "model_type": str(self.model_type), **said},
        )

    def _mesh(self, num_ranks: int | None) -> Mesh:
        """The grid of ranks that the arguments ask for, or that `slices` were made for."""
        asked = getattr(self.slices, "mesh", None)
        if not isinstance(asked, Mesh):
            return self._mesh_of_arguments(num_ranks)
        is_unsaid = self.tp is None and self.pp == 1 and self.ep is False and self.replicas in (None, 1)
        mesh = asked if is_unsaid else self._mesh_of_arguments(num_ranks)
        if mesh != asked:
            raise SettingsError(
                f"slices are for {asked.as_arguments}, and the arguments of this call say {mesh.as_arguments}: give the same sizes, or "
                "leave tp, pp, ep and replicas out"
            )
        if num_ranks is not None and num_ranks != mesh.num_ranks:
            raise SettingsError(
                f"slices are for {asked.as_arguments}, which takes {counted(mesh.num_ranks, 'rank')}, and this load has {num_ranks}"
            )
        return mesh

    def _mesh_of_arguments(self, num_ranks: int | None) -> Mesh:
        stages = self.num_stages
        tp, replicas = self.tp, self.replicas
        if num_ranks is None:
            tp, replicas = 1 if tp is None else tp, 1 if replicas is None else replicas
        else:
            tp, replicas = _divided(num_ranks, tp, stages)
        # Both are numbers, too, but mean all of tp, and not at all.
        return Mesh(tp=tp, pp=stages, dp=replicas, ep=tp if self.ep is True else 1 if self.ep is False else self.ep)

    def _slice_source(self, mesh: Mesh) -> SliceSource:
        if self.slices is not None:
            return self.slices
        return RuleSlices(
            mesh=mesh,
            rules=ShardRules(self.rules or ()),
            unmatched=self.unmatched,
            layout=self.layout,
            mtp=self.mtp,
            stage_layers=None if isinstance(self.pp, int) else tuple(self.pp),
            experts=self.experts,
            fuse=self.fuse,
            rename=self.rename,
            dtype=self.dtype,
        )

    def _refuse_beside_slices(self) -> None:
        if not callable(self.slices):
            raise SettingsError(
                f"slices is a function of index and rank, such as RuleSlices, got {type(self.slices).__name__}"
            )
        if self.rules is not None:
            raise SettingsError("give rules or slices, not both: slices say all that rules could")
        if self.layout != _UNSET.layout or self.mtp:
            raise SettingsError(f"layout={self.layout!r} and mtp={self.mtp} choose a preset; slices need none")
        if self.unmatched != _UNSET.unmatched:
            raise SettingsError(f"with slices no rule is looked for; leave out unmatched={self.unmatched!r}")
        if self.experts is not None or not isinstance(self.pp, int):
            raise SettingsError("with slices, which say all of it, experts and layers of stages are not given")
        if self.fuse is not False or self.rename is not None or self.dtype is not None:
            raise SettingsError(
                "with slices, which say names, shapes and dtypes of results, give no fuse, rename or dtype"
            )


SHARDING = Sharding()
"""The defaults of every argument that says which part a rank holds."""


def _divided(num_ranks: int, tp: int | None, stages: int) -> tuple[int, int]:
    """The tp and the replicas of a load whose ranks exist already.

    Raises:
        SettingsError: The sizes do not divide the number of ranks.
    """
    if stages < 1 or num_ranks % stages:
        raise SettingsError(f"pp={stages} does not divide the {counted(num_ranks, 'rank')} of this load")
    if tp is None:
        tp = num_ranks // stages
    if tp < 1 or num_ranks % (tp * stages):
        with_pp = f" and pp={stages}" if stages > 1 else ""
        advice = "; start the ranks with torchrun, or say rank and world_size" if tp > num_ranks == 1 else ""
        raise SettingsError(f"tp={tp}{with_pp} does not divide the {counted(num_ranks, 'rank')} of this load{advice}")
    return tp, num_ranks // (tp * stages)
