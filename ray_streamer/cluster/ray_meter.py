"""How do metrics reach Ray's Prometheus endpoint? Through `ray.util.metrics`, from whatever process of a cluster loads."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ray_streamer.report.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.rank.recorder import Phase
    from ray_streamer.report.metering import Tags
    from ray_streamer.report.metrics import Metric


def is_in_ray() -> bool:
    """Whether this process is connected to a cluster; asks a Ray that is imported already, and imports none."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class RayMeter:
    """A `Meter` on the cluster of this process; spans go nowhere."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            said: dict[str, Any] = {"description": metric.says, "tag_keys": metric.tags}
            if metric.kind == "histogram":
                made = Histogram(metric.name, boundaries=list(metric.boundaries), **said)
            else:
                made = (Counter if metric.kind == "counter" else Gauge)(metric.name, **said)
            self._metrics[metric.name] = made

    def add(self, metric: Metric, amount: float, tags: Tags) -> None:
        """See `Meter`."""
        self._metrics[metric.name].inc(amount, tags=tags)

    def put(self, metric: Metric, value: float, tags: Tags) -> None:
        """See `Meter`."""
        self._metrics[metric.name].set(value, tags=tags)

    def observe(self, metric: Metric, values: Sequence[float], tags: Tags) -> None:
        """See `Meter`."""
        histogram = self._metrics[metric.name]
        for value in values:
            histogram.observe(value, tags=tags)

    def span(self, phase: Phase, tags: Tags) -> None:
        """Ray has no spans of its own."""
