"""Loads safetensors checkpoints from S3 or a shared filesystem, tensor-parallel, into the ranks of a Ray cluster.

    import ray_streamer

    with ray_streamer.load_sharded("s3://bucket/model", tp=8) as model:
        model.run(serve)          # serve(context) on every rank, beside its tensors

Every byte leaves storage once per node, staging memory stays below the limit that was given, and each tensor slice is written
once, into its final memory. Importing this package imports neither Ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ray_streamer import errors
from ray_streamer.collector import collector_paused
from ray_streamer.errors import (
    AccessError,
    BudgetError,
    CaptureError,
    CheckpointError,
    ClusterError,
    CredentialsError,
    DeviceError,
    HeaderError,
    IndexMismatchError,
    LoadAbortedError,
    ObjectChangedError,
    ObjectMissingError,
    PlanError,
    RankFailedError,
    RayStreamerError,
    SettingsError,
    ShardingError,
    ShortReadError,
    StartupTimeoutError,
    StorageError,
    ThrottledError,
)

if TYPE_CHECKING:
    from ray_streamer.api.files import ls, pull
    from ray_streamer.api.plan import plan
    from ray_streamer.api.rank import load_rank, stream_rank
    from ray_streamer.api.sharded import load_sharded
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.cluster.model import ShardedModel
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.planning.summary import summarize
    from ray_streamer.rank.context import RankContext
    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.settings import Settings
    from ray_streamer.sharding import (
        Mesh,
        Part,
        Replicate,
        Rule,
        ShardRules,
        Skip,
        Split,
        SplitGroups,
        SplitVocabulary,
    )
    from ray_streamer.sharding.source import RuleSlices
    from ray_streamer.slices import Move, RankSlices, ResultSpec, Side

_HOMES = {
    "CheckpointIndex": "checkpoint",
    "LoadReport": "report.load_report",
    "Mesh": "sharding",
    "Move": "slices",
    "Part": "sharding",
    "PlacementOptions": "cluster.placement",
    "RankContext": "rank.context",
    "RankSlices": "slices",
    "ReadPlan": "planning.read_plan",
    "Replicate": "sharding",
    "ResultSpec": "slices",
    "Rule": "sharding",
    "RuleSlices": "sharding.source",
    "Settings": "settings",
    "ShardRules": "sharding",
    "ShardedModel": "cluster.model",
    "Side": "slices",
    "Skip": "sharding",
    "Split": "sharding",
    "SplitGroups": "sharding",
    "SplitVocabulary": "sharding",
    "load_rank": "api.rank",
    "load_sharded": "api.sharded",
    "ls": "api.files",
    "plan": "api.plan",
    "pull": "api.files",
    "stream_rank": "api.rank",
    "summarize": "planning.summary",
}

__all__ = [
    "AccessError",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "CheckpointIndex",
    "ClusterError",
    "CredentialsError",
    "DeviceError",
    "HeaderError",
    "IndexMismatchError",
    "LoadAbortedError",
    "LoadReport",
    "Mesh",
    "Move",
    "ObjectChangedError",
    "ObjectMissingError",
    "Part",
    "PlacementOptions",
    "PlanError",
    "RankContext",
    "RankFailedError",
    "RankSlices",
    "RayStreamerError",
    "ReadPlan",
    "Replicate",
    "ResultSpec",
    "Rule",
    "RuleSlices",
    "Settings",
    "SettingsError",
    "ShardRules",
    "ShardedModel",
    "ShardingError",
    "ShortReadError",
    "Side",
    "Skip",
    "Split",
    "SplitGroups",
    "SplitVocabulary",
    "StartupTimeoutError",
    "StorageError",
    "ThrottledError",
    "errors",
    "load_rank",
    "load_sharded",
    "ls",
    "plan",
    "pull",
    "stream_rank",
    "summarize",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with collector_paused():
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Over a submodule of the same name, such as `plan`, which the import has just bound.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
