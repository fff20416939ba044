"""Which cold starts are simulated? Every model, storage, way and number of nodes; then what one setting brings, and what one slow node costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cold_starts.scenarios import GBIT, GPU_NODE, NUM_NODES, S3, STORAGES, models
from cold_starts.strategies import STRATEGIES, Case, answer, cluster_of
from ray_streamer.report.verdict.model import ClusterModel, NodeGroup
from ray_streamer.report.verdict.planned import MAX_BLOCKS
from ray_streamer.report.verdict.replay import replay_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cold_starts.scenarios import Model
    from cold_starts.strategies import Strategy

SHOWN_NODES = (1, 8, 64, 1024)
"""In the tables."""

CONCURRENCIES = (4, 8, 16, 32, 64, 128)
LINKS_GBIT = (25, 100, 400)
STRAGGLER_NODES = 8
STRAGGLER_SHARE = 0.1
_ALL_BLOCKS = 1 << 40
BUILT = next(strategy for strategy in STRATEGIES if strategy.sharing == "slices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One simulated cold start.

    Attributes:
        model: Its name.
        storage: Its name.
        strategy: Its name.
        num_nodes: Replicas.
        seconds: Until the last byte is on the last GPU.
        storage_bytes: What the storage serves to all nodes.
        bound: What saves most when it is left out; None where it was not looked for.
    """

    model: str
    storage: str
    strategy: str
    num_nodes: int
    seconds: float
    storage_bytes: int
    bound: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What so many requests in flight bring on one node with such a link."""

    link_gbit: int
    concurrency: int
    seconds: float
    bound: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """What one node with a slow link costs.

    Attributes:
        strategy: Its name.
        usual_seconds: Of all nodes, when none is slow.
        others_seconds: Of the others, when one is.
        slow_seconds: Of that one.
    """

    strategy: str
    usual_seconds: float
    others_seconds: float
    slow_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """What a load takes by a part of its blocks, and by all.

    Attributes:
        num_nodes: Replicas.
        seconds: By the part, as in all other figures.
        whole_seconds: By all of them.
    """

    num_nodes: int
    seconds: float
    whole_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """All of them."""

    starts: tuple[Start, ...]
    settings: tuple[Setting, ...]
    stragglers: tuple[Straggler, ...]
    excerpts: tuple[Excerpt, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def simulate(told: Callable[[str], None], chosen: Sequence[Model] | None = None) -> Simulated:
    """Takes some minutes.

    Args:
        told: Is given a line for each model and storage.
        chosen: Models; None for those of the page.
    """
    some = models() if chosen is None else chosen
    return Simulated(
        starts=tuple(_starts(some, told)),
        settings=tuple(_settings(some[0])),
        stragglers=tuple(_straggler(some[0], strategy) for strategy in STRATEGIES),
        excerpts=tuple(_excerpt(some[0], num_nodes) for num_nodes in SHOWN_NODES),
    )


def _starts(some: Sequence[Model], told: Callable[[str], None]) -> Iterator[Start]:
    for model in some:
        for storage in STORAGES:
            told(f"{model.name} from {storage.name}")
            for strategy in STRATEGIES:
                for num_nodes in NUM_NODES:
                    case = Case(model=model, storage=storage, machine=GPU_NODE, strategy=strategy, num_nodes=num_nodes)
                    found = answer(case, finds_bound=strategy is BUILT or num_nodes in SHOWN_NODES)
                    yield Start(
                        model=model.name,
                        storage=storage.name,
                        strategy=strategy.name,
                        num_nodes=num_nodes,
                        seconds=found.seconds,
                        storage_bytes=found.storage_bytes,
                        bound=found.bound,
                    )


def _settings(model: Model) -> Iterator[Setting]:
    for link in LINKS_GBIT:
        machine = replace(GPU_NODE, link_rate=link * GBIT)
        for concurrency in CONCURRENCIES:
            found = answer(
                Case(model=model, storage=S3, machine=machine, strategy=BUILT, num_nodes=1, concurrency=concurrency)
            )
            yield Setting(link_gbit=link, concurrency=concurrency, seconds=found.seconds, bound=found.bound)


def _straggler(model: Model, strategy: Strategy) -> Straggler:
    cluster = cluster_of(Case(model=model, storage=S3, machine=GPU_NODE, strategy=strategy, num_nodes=STRAGGLER_NODES))
    (usual,) = replay_cluster(cluster)
    others, slow = replay_cluster(with_slow_node(cluster, STRAGGLER_SHARE))
    return Straggler(strategy=strategy.name, usual_seconds=usual, others_seconds=others, slow_seconds=slow)


def _excerpt(model: Model, num_nodes: int) -> Excerpt:
    case = Case(model=model, storage=S3, machine=GPU_NODE, strategy=BUILT, num_nodes=num_nodes)
    (seconds,), (whole_seconds,) = (
        replay_cluster(cluster_of(case, max_blocks=number)) for number in (MAX_BLOCKS, _ALL_BLOCKS)
    )
    return Excerpt(num_nodes=num_nodes, seconds=seconds, whole_seconds=whole_seconds)


def with_slow_node(cluster: ClusterModel, share: float) -> ClusterModel:
    """The same, but one node's link has this share of the rate."""
    (group,) = cluster.groups
    slow = NodeGroup(replace(group.node, node_rate=share * group.node.node_rate))
    return replace(cluster, groups=(NodeGroup(group.node, group.num_nodes - 1), slow))
