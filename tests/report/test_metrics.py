"""Metrics say what the load's own statistics say, wherever they go; what goes wrong with them is none of the load."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

import ray_streamer
from ray_streamer.cluster import meters
from ray_streamer.report import metering, metrics
from ray_streamer.report.metrics import METRICS
from ray_streamer.sharding import RuleSlices, ShardRules
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.s3_server import free_port

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
SETTINGS = {"metrics": True, "page_cache": "off", "block_bytes": 4096, "memory_limit": 4 * 4096, "concurrency": 2}


class Collected:
    """A meter that keeps what it gets, by metric and tags."""

    def __init__(self) -> None:
        self.sums = defaultdict(float)
        self.values = defaultdict(list)
        self.spans = []
        self.tags = set()

    def add(self, metric, amount, tags):
        assert amount > 0
        assert set(tags) == set(metric.tags)
        self.sums[metric.name, tags.get("error", "")] += amount
        self.tags.add((tags["uri"], tags["rank"]))

    def put(self, metric, value, tags):
        assert set(tags) == set(metric.tags)
        self.values[metric.name].append(value)

    def observe(self, metric, values, tags):
        assert set(tags) == set(metric.tags)
        assert all(value >= 0 for value in values)
        self.values[metric.name] += values

    def span(self, phase, tags):
        self.spans.append(phase.name)


@pytest.fixture
def folder(tmp_path):
    return str(write_checkpoint(tmp_path / "model", [TensorSpec("up_proj.weight", "F32", (64, 1024))]))


def load(folder, **settings):
    told = []
    ray_streamer.load_rank(
        folder,
        rank=0,
        world_size=1,
        rules={"*": ray_streamer.Split(0)},
        settings=ray_streamer.Settings.resolve(**SETTINGS | settings),
        on_statistics=told.append,
    )
    return told[0]


@pytest.fixture
def collected(monkeypatch):
    meter = Collected()
    monkeypatch.setattr("ray_streamer.cluster.meters.find_meter", lambda *, is_wanted: meter if is_wanted else None)
    return meter


@pytest.mark.parametrize("seconds_between_looks", [0.001, 1000.0])
def test_a_load_publishes_what_it_counts(folder, collected, monkeypatch, seconds_between_looks):
    monkeypatch.setattr(metering, "_SECONDS_BETWEEN_LOOKS", seconds_between_looks)
    statistics = load(folder)
    sums = {name: amount for (name, _), amount in collected.sums.items()}
    assert sums == {
        metrics.READ_BYTES.name: statistics.bytes_read,
        metrics.DELIVERED_BYTES.name: statistics.bytes_delivered,
        metrics.REQUESTS.name: statistics.num_requests,
        metrics.LOADS.name: 1,
    }
    assert statistics.bytes_read == 64 * 1024 * 4
    for metric, seconds in (
        (metrics.BLOCK_SECONDS, statistics.read_seconds),
        (metrics.FIRST_BYTE_SECONDS, statistics.first_byte_seconds),
    ):
        assert len(collected.values[metric.name]) == statistics.num_requests
        assert sum(collected.values[metric.name]) == pytest.approx(seconds, abs=1e-5)
    phases = {name: seconds for name, seconds in statistics.seconds.items() if name in collected.spans}
    assert collected.values[metrics.PHASE_SECONDS.name] == pytest.approx(list(phases.values()), abs=1e-5)
    assert {"connect", "stream", "finish"} <= set(collected.spans)
    staged = collected.values[metrics.STAGING_BYTES.name]
    assert (max(staged) <= SETTINGS["memory_limit"], staged[-1]) == (True, 0)
    assert collected.tags == {(folder, "0")}


def test_of_many_blocks_some_latencies_are_published(constructed, statistics_of):
    """So that metrics cost the same however small the blocks are."""
    trace = constructed(num_blocks=5000, first_byte_seconds=0.2).trace()

    class Load:
        staging_bytes = 0

        def statistics(self):
            return statistics_of(trace, num_requests=5000)

        def spans(self):
            return trace.spans

    meter = Collected()
    with metering.metered(meter, Load(), uri="s3://bucket/model", node="here", rank=0):
        pass
    latencies = meter.values[metrics.FIRST_BYTE_SECONDS.name]
    assert len(latencies) == metering.MOST_LATENCIES
    assert latencies == pytest.approx([0.2] * len(latencies))
    assert meter.sums[metrics.REQUESTS.name, ""] == 5000


def test_a_load_that_fails_is_counted_by_its_error(folder, collected):
    (file,) = Path(folder).glob("*.safetensors")
    slices = RuleSlices(rules=ShardRules({"*": ray_streamer.Split(0)}))

    def cut_then_say(index, rank):
        os.truncate(file, file.stat().st_size - 4096)
        return slices(index, rank)

    with pytest.raises(ray_streamer.StorageError) as raised:
        ray_streamer.load_rank(
            folder, rank=0, world_size=1, slices=cut_then_say, settings=ray_streamer.Settings.resolve(**SETTINGS)
        )
    assert collected.sums[metrics.FAILURES.name, type(raised.value).__name__] == 1
    assert (metrics.LOADS.name, "") not in collected.sums


def test_a_place_that_fails_costs_metrics_only(folder, collected, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("the exporter is gone")

    monkeypatch.setattr(collected, "add", refuse)
    assert load(folder).bytes_read == 64 * 1024 * 4
    assert caplog.text.count("its metrics are published no longer") == 1


def test_without_the_setting_nothing_is_published(folder, collected):
    load(folder, metrics=False)
    assert not collected.sums
    assert not collected.values
    assert not any(thread.name == "ray_streamer-metrics" for thread in threading.enumerate())


def test_where_metrics_have_no_place_to_go_it_is_said_once(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setattr(meters, "is_in_ray", lambda: False)
    meters._open_telemetry_meter.cache_clear()
    assert load(folder).bytes_read
    assert load(folder).bytes_read
    assert caplog.text.count("opentelemetry-api is not installed") == 1
    meters._open_telemetry_meter.cache_clear()


def test_open_telemetry_gets_metrics_and_a_span_for_each_phase(folder, monkeypatch):
    """The SDK's own readers say what arrived."""
    pytest.importorskip("opentelemetry.sdk", reason="pip install opentelemetry-sdk")
    from opentelemetry import metrics as api
    from opentelemetry import trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    reader, exporter, tracers = InMemoryMetricReader(), InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    provider = MeterProvider([reader])
    monkeypatch.setattr(api, "get_meter", provider.get_meter)
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(meters, "is_in_ray", lambda: False)
    meters._open_telemetry_meter.cache_clear()
    statistics = load(folder)
    meters._open_telemetry_meter.cache_clear()
    (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    points = {metric.name: next(iter(metric.data.data_points)) for metric in scope.metrics}
    assert points["ray_streamer_read_bytes"].value == statistics.bytes_read
    assert points["ray_streamer_read_bytes"].attributes["uri"] == folder
    assert points["ray_streamer_block_seconds"].count == statistics.num_requests
    assert points["ray_streamer_block_seconds"].explicit_bounds == metrics.BLOCK_SECONDS.boundaries
    spans = {span.name: (span.end_time - span.start_time) / 1e9 for span in exporter.get_finished_spans()}
    assert spans["ray_streamer stream"] == pytest.approx(statistics.seconds["stream"], abs=1e-3)
    provider.shutdown()


def test_each_query_of_the_dashboard_names_a_metric_that_exists():
    known = {series for metric in METRICS for series in metric.series}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = queries()
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    named = {query: set(re.findall(r"ray_streamer_\w+", query)) for query in asked}
    assert all(names and names <= known for names in named.values()), named
    shown = set().union(*named.values())
    assert all(shown & set(metric.series) for metric in METRICS), "each metric is on the dashboard"
    page = (DASHBOARD.parent / "metrics.md").read_text()
    assert all(f"`ray_{metric.name}" in page for metric in METRICS)
    tags = {tag for metric in METRICS for tag in metric.tags}
    assert {tag for query in asked for by in re.findall(r"by \((\w+)\)", query) for tag in [by]} <= tags | {"le"}


def test_a_load_that_fails_before_it_reads_is_counted_too(tmp_path, collected):
    with pytest.raises(ray_streamer.StorageError):
        load(str(tmp_path / "nowhere"))
    assert collected.sums == {(metrics.FAILURES.name, "ObjectMissingError"): 1}


def test_a_load_that_its_caller_ends_has_not_failed(folder, collected):
    tensors = ray_streamer.stream_rank(folder, rank=0, world_size=1, settings=ray_streamer.Settings.resolve(**SETTINGS))
    next(tensors)
    tensors.close()
    assert (metrics.FAILURES.name, "LoadAbortedError") not in collected.sums


class Scraped:
    """What a rank's process shows: nothing before it loads, and everything at once after a short load."""

    TAGS = 'uri="s3://b/m",node="n",rank="0"'

    def __init__(self) -> None:
        self.lines: list[str] = []
        shown = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = "".join(line + "\n" for line in shown.lines).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def show(self, values: dict[str, float]) -> None:
        self.lines = [f"{name.format(tags=self.TAGS)} {value}" for name, value in values.items()]


@pytest.mark.slow
def test_the_dashboard_shows_a_load_that_was_over_before_it_was_looked_at(tmp_path):
    """A rank's series begins with what its whole load came to, of which `rate` and `increase` of Prometheus tell nothing."""
    program = shutil.which("prometheus") or pytest.skip("there is no Prometheus: apt-get install prometheus")
    scraped, port = Scraped(), free_port()
    job = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{scraped.server.server_port}"]}]}
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": [job]})
    )
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as prometheus:
        try:
            asked = f"http://127.0.0.1:{port}/api/v1/query?query="
            expected = {
                "ray_streamer_read_bytes_total": 6e9 / 60,
                "ray_streamer_loads_total": 1,
                "ray_streamer_failures_total": 2,
                "ray_streamer_block_seconds_bucket": pytest.approx(0.015, abs=0.005),
                "ray_streamer_phase_seconds_sum": 1.5,
            }
            scraped.show(
                {
                    "ray_streamer_read_bytes_total{{{tags}}}": 6e9,
                    "ray_streamer_loads_total{{{tags}}}": 1,
                    'ray_streamer_failures_total{{{tags},error="AccessError"}}': 2,
                    'ray_streamer_block_seconds_bucket{{{tags},le="0.01"}}': 0,
                    'ray_streamer_block_seconds_bucket{{{tags},le="0.02"}}': 9,
                    'ray_streamer_block_seconds_bucket{{{tags},le="+Inf"}}': 9,
                    'ray_streamer_phase_seconds_sum{{{tags},phase="stream"}}': 3,
                    'ray_streamer_phase_seconds_count{{{tags},phase="stream"}}': 2,
                }
            )
            for series, value in expected.items():
                query = next(query for query in queries() if series in query)
                for name, said in {"$uri": ".*", "$__interval_ms": "60000", "$__interval": "1m"}.items():
                    query = query.replace(name, said)
                assert answer_of(asked + quote(query)) == value, query
        finally:
            prometheus.terminate()
            scraped.server.shutdown()
            scraped.server.server_close()


def answer_of(url: str) -> float:
    """The one value of a query, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
            if result:
                return float(result[0]["value"][1])
        time.sleep(0.2)
    pytest.fail(f"no answer: {url}")


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
