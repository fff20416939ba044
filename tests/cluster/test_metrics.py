"""Metrics of a load stand at the Prometheus endpoint of a running Ray, under the names that the dashboard asks for."""

from __future__ import annotations

import importlib.util
import re
import threading
import time
import urllib.request

import pytest

import ray_streamer
from ray_streamer.cluster.connection import connect
from ray_streamer.report import metrics
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

# What `pip install "ray[default]"` adds; without it Ray has no endpoint.
NEEDED = ("aiohttp_cors", "opencensus", "prometheus_client", "opentelemetry.exporter.prometheus")
MOST_SECONDS = 90


@pytest.fixture
def endpoint(monkeypatch):
    missing = [name for name in NEEDED if not has(name)]
    if missing:
        pytest.skip(f'ray has no Prometheus endpoint without {", ".join(missing)}: pip install "ray[default]"')
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    session = connect("local", num_local_cpus=2)
    import ray

    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    session.close()


def has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def scrape(endpoint: str) -> dict[str, float]:
    """The sum of each series over its tags, of this package alone."""
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    sums: dict[str, float] = {}
    for line in lines:
        found = re.match(r"(ray_streamer_\w+)\{(.*)\} (\S+)", line)
        if found and ('le="' not in found[2] or 'le="+Inf"' in found[2]):
            sums[found[1]] = sums.get(found[1], 0.0) + float(found[3])
    return sums


@pytest.mark.slow
def test_metrics_of_a_load_are_scraped_from_ray(endpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "model", [TensorSpec("up_proj.weight", "F32", (64, 1024))])
    settings = ray_streamer.Settings.resolve(metrics=True, page_cache="off", block_bytes=4096)
    rules = {"*": ray_streamer.Split(0)}
    deadline, found = time.monotonic() + MOST_SECONDS, {}
    with ray_streamer.load_sharded(str(folder), tp=2, rules=rules, settings=settings) as model:
        report = model.stats()
        pause = threading.Event()
        while found.get("ray_streamer_loads_total", 0) < 2 and time.monotonic() < deadline:
            pause.wait(0.5)
            found = scrape(endpoint)
    assert found["ray_streamer_loads_total"] == 2
    assert found["ray_streamer_read_bytes_total"] == report.bytes_read
    assert found["ray_streamer_delivered_bytes_total"] == report.bytes_delivered
    num_requests = sum(rank.num_requests for rank in report.ranks)
    assert found["ray_streamer_requests_total"] == found["ray_streamer_block_seconds_count"] == num_requests
    assert found["ray_streamer_block_seconds_bucket"] == num_requests
    assert found["ray_streamer_block_seconds_sum"] > 0, "Ray makes it up from the buckets"
    counted = (metrics.RETRIES, metrics.THROTTLED, metrics.HEDGES, metrics.FAILURES, metrics.PAGE_CACHE_BYTES)
    named = {series for metric in metrics.METRICS if metric not in counted for series in metric.series}
    assert named <= found.keys(), "what did not happen has no series yet"
