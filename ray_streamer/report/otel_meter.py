"""How do metrics reach OpenTelemetry? Through its API, where it is installed; what its SDK does with them is the program's own affair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.report.metrics import METRICS
from ray_streamer.report.trace import epoch_of_this_clock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.rank.recorder import Phase
    from ray_streamer.report.metering import Tags
    from ray_streamer.report.metrics import Metric

_SCOPE = "ray_streamer"


class OpenTelemetryMeter:
    """A `Meter` on the providers of this process, and a tracer for spans of phases.

    Raises:
        ImportError: The API is not installed.
    """

    def __init__(self) -> None:
        from opentelemetry import metrics, trace  # pyright: ignore[reportMissingImports]  # where it is installed

        meter = metrics.get_meter(_SCOPE)
        self._tracer = trace.get_tracer(_SCOPE)
        make = {"counter": meter.create_counter, "gauge": meter.create_gauge, "histogram": meter.create_histogram}
        self._instruments: dict[str, Any] = {}
        for metric in METRICS:
            more: dict[str, Any] = (
                {"explicit_bucket_boundaries_advisory": metric.boundaries} if metric.boundaries else {}
            )
            name, said = f"ray_{metric.name}", {"unit": metric.unit, "description": metric.says}
            self._instruments[metric.name] = make[metric.kind](name, **said, **more)

    def add(self, metric: Metric, amount: float, tags: Tags) -> None:
        """See `Meter`."""
        self._instruments[metric.name].add(amount, tags)

    def put(self, metric: Metric, value: float, tags: Tags) -> None:
        """See `Meter`."""
        self._instruments[metric.name].set(value, tags)

    def observe(self, metric: Metric, values: Sequence[float], tags: Tags) -> None:
        """See `Meter`."""
        instrument = self._instruments[metric.name]
        for value in values:
            instrument.record(value, tags)

    def span(self, phase: Phase, tags: Tags) -> None:
        """A span of the phase, at the time of this machine's date."""
        epoch_seconds = epoch_of_this_clock()
        start, stop = (round((reading + epoch_seconds) * 1e9) for reading in (phase.start, phase.stop))
        self._tracer.start_span(f"ray_streamer {phase.name}", attributes=tags, start_time=start).end(end_time=stop)
