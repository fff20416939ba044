"""What did the caller ask for? Arguments checked against each other, made one `LoadRequest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ray_streamer.errors import SettingsError
from ray_streamer.rank.request import LoadRequest
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.rules import ShardRules
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.storage import absolute_uri

if TYPE_CHECKING:
    from ray_streamer.settings import Settings
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.fuse import FuseLike
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.rules import RulesLike
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage import UriLike

Stages = int | Sequence[int]
"""How many stages, or the number of layers of each one."""


class SliceArguments(TypedDict, total=False):
    """What says which part of each tensor a rank holds, and in which results; every one as in `load_sharded`."""

    rules: RulesLike | None
    slices: SliceSource | None
    unmatched: Unmatched
    layout: Layout
    mtp: bool
    experts: ExpertsLike | None
    fuse: FuseLike
    rename: RenameLike | None
    dtype: DTypeLike


def slice_arguments(arguments: Mapping[str, Any]) -> SliceArguments:
    """Those among `arguments` that say which part of each tensor a rank holds."""
    named: Any = {name: arguments[name] for name in SliceArguments.__annotations__ if name in arguments}
    return named


def make_request(
    uri: UriLike,
    *,
    tp: int,
    pp: Stages,
    ep: int | bool,
    replicas: int,
    settings: Settings,
    device: str,
    **slicing: Unpack[SliceArguments],
) -> LoadRequest:
    """The request that the arguments of a load describe.

    A local path is made absolute here, where the caller speaks: on the ranks it may mean another folder.

    Raises:
        SettingsError: They do not fit together, or `uri` is none.
        ShardingError: `rules`, `fuse`, `rename` or `dtype` cannot mean anything.
    """
    # Both are numbers, too, but mean all of tp, and not at all.
    mesh = Mesh(tp=tp, pp=num_stages(pp), dp=replicas, ep=tp if ep is True else 1 if ep is False else ep)
    stage_layers = None if isinstance(pp, int) else tuple(pp)
    return LoadRequest(
        uri=absolute_uri(uri),
        mesh=mesh,
        slices=_slice_source(mesh, stage_layers, **slicing),
        settings=settings,
        device=device,
    )


def num_stages(pp: Stages) -> int:
    """Stages that `pp` asks for.

    Raises:
        SettingsError: It is neither a number nor a list of them.
    """
    if isinstance(pp, int):
        return pp
    if not isinstance(pp, Sequence) or isinstance(pp, str) or not pp:
        raise SettingsError(f"pp is a number of stages, or the number of layers of each, such as (31, 30), got {pp!r}")
    return len(pp)


def _slice_source(mesh: Mesh, stage_layers: tuple[int, ...] | None, **slicing: Unpack[SliceArguments]) -> SliceSource:
    rules, slices, experts = (slicing.get(name) for name in ("rules", "slices", "experts"))
    layout, mtp = slicing.get("layout", "generic"), slicing.get("mtp", False)
    fuse, rename, dtype = slicing.get("fuse", False), slicing.get("rename"), slicing.get("dtype")
    if slices is None:
        return RuleSlices(
            mesh=mesh,
            rules=ShardRules(rules or ()),
            unmatched=slicing.get("unmatched", "error"),
            layout=layout,
            mtp=mtp,
            stage_layers=stage_layers,
            experts=experts,
            fuse=fuse,
            rename=rename,
            dtype=dtype,
        )
    if rules is not None:
        raise SettingsError("give rules or slices, not both: slices say all that rules could")
    if layout != "generic" or mtp:
        raise SettingsError(f"layout={layout!r} and mtp={mtp} choose a preset; slices need none")
    if experts is not None or stage_layers is not None:
        raise SettingsError("with slices, which say all of it, experts and layers of stages are not given")
    if fuse is not False or rename is not None or dtype is not None:
        raise SettingsError("with slices, which say names, shapes and dtypes of results, give no fuse, rename or dtype")
    return slices
