"""Where do the metrics of a rank go? To Ray where this process is part of a cluster, else to OpenTelemetry, else nowhere."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from ray_streamer.cluster.ray_meter import RayMeter, is_in_ray
from ray_streamer.report.otel_meter import OpenTelemetryMeter

if TYPE_CHECKING:
    from ray_streamer.report.metering import Meter

logger = logging.getLogger(__name__)


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
