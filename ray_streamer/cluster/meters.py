"""Where do the metrics of a rank go? To Ray where this process is part of a cluster, else to OpenTelemetry, else nowhere."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from ray_streamer.cluster.ray_meter import RayMeter, is_in_ray
from ray_streamer.report.metering import failures_metered, metered
from ray_streamer.report.otel_meter import OpenTelemetryMeter

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ray_streamer.report.metering import Meter, MeteredLoad

logger = logging.getLogger(__name__)


def published(load: MeteredLoad, *, is_wanted: bool, uri: str, node: str, rank: int) -> AbstractContextManager[None]:
    """For the length of the block, which runs the load, its metrics are published where there is a place for them.

    Args:
        load: Is looked at.
        is_wanted: The setting `metrics`.
        uri: What is loaded.
        node: Name of the rank's node.
        rank: Global rank.
    """
    return metered(find_meter(is_wanted=is_wanted), load, uri=uri, node=node, rank=rank)


def failures_published(*, is_wanted: bool, uri: str, node: str, rank: int) -> AbstractContextManager[None]:
    """An error that leaves the block, which is a part of a load, is counted where there is a place for metrics.

    Args:
        is_wanted: The setting `metrics`.
        uri: What is loaded.
        node: Name of the rank's node.
        rank: Global rank.
    """
    return failures_metered(find_meter(is_wanted=is_wanted), uri=uri, node=node, rank=rank)


def find_meter(*, is_wanted: bool) -> Meter | None:
    """The place for metrics; None where none are wanted, or where there is no such place.

    Args:
        is_wanted: The setting `metrics`.
    """
    if not is_wanted:
        return None
    return _ray_meter() if is_in_ray() else _open_telemetry_meter()


@lru_cache(maxsize=1)
def _ray_meter() -> RayMeter:
    return RayMeter()


@lru_cache(maxsize=1)
def _open_telemetry_meter() -> OpenTelemetryMeter | None:
    try:
        return OpenTelemetryMeter()
    except ImportError:
        logger.warning(
            "metrics=True publishes nothing here: this process is in no Ray cluster, and opentelemetry-api is not installed"
        )
        return None
