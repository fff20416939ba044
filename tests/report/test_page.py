"""The page shows the report's own numbers, from a file as from memory, and nothing that names from outside could do to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.report.page.document import figures_of, render_page
from ray_streamer.report.saved_report import read_report, report_of
from ray_streamer.report.tensor_kinds import KindReads
from ray_streamer.storage.base import Incident, StorageStatistics

MIB = 1 << 20
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m"


@pytest.fixture
def report(constructed, report_on):
    """A load of two ranks, with retries, and with kinds of tensors whose names are hostile."""
    traces = [constructed(rank=rank, num_ranks=2, first_byte_seconds=0.2, stream_rate=5e7).trace() for rank in range(2)]
    began = traces[0].spans.phases[0].start
    traces[1] = replace(traces[1], incidents=(Incident("retry", began + 0.1), Incident("hedge", began + 0.2)))
    storage = StorageStatistics(num_retries=1, num_hedges=1)
    found = report_on(*traces, bytes_read=40 * MIB, num_requests=40, storage=storage)
    kind = KindReads(
        name=HOSTILE, num_tensors=3, checkpoint_bytes=MIB, needed_bytes=MIB, read_bytes=2 * MIB, result_bytes=MIB
    )
    return replace(found, evidence=replace(found.findings, tensor_kinds=(kind,)))


class Page(HTMLParser):
    """What a browser makes of a page: values by key and rank, data of scripts, and every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}
        self.data: dict[str, object] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        self.tags.append((tag, said))
        self._inside = said.get("id", "") if said.get("type") == "application/json" else ""
        if "data-key" in said:
            self.values.setdefault(said["data-key"], []).append(float(said["data-value"]))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside:
            self.data[self._inside] = json.loads(data)


def test_a_report_comes_back_from_its_file(report, tmp_path):
    path = tmp_path / "load.json"
    path.write_text(json.dumps(report.as_dict()))
    again = read_report(path)
    assert json.loads(json.dumps(again.as_dict())) == json.loads(path.read_text())
    assert render_page(again, plotly_js="") == render_page(report, plotly_js="")


def test_numbers_on_the_page_are_those_of_the_json(report):
    said = json.loads(json.dumps(report.as_dict()))
    page = Page(render_page(report, plotly_js=""))
    assert page.data["report"] == said
    ranks = said["ranks"]
    assert page.values["needed_bytes"] == [said["needed_bytes"]]
    assert page.values["bytes_read"] == [said["bytes_read"], *(rank["bytes_read"] for rank in ranks)]
    assert page.values["num_retries"] == [2, *(rank["storage"]["num_retries"] for rank in ranks)]
    assert page.values["gigabytes_per_second"] == [said["gigabytes_per_second"]]
    assert page.values["cpu_seconds"] == [rank["cpu_seconds"] for rank in ranks]


def test_numbers_of_the_charts_are_those_of_the_json(report):
    said, figures = report.as_dict(), {figure.key: figure for figure in figures_of(report)}
    timeline = said["timeline"]
    traces = {key: {trace["name"]: trace for trace in figure.traces} for key, figure in figures.items()}
    assert {name: trace["x"] for name, trace in traces["phases"].items()} == {
        name: [seconds] for name, seconds in said["seconds"].items() if name != "total"
    }
    part = timeline["seconds"] / len(timeline["ranks"][0]["received_bytes"])
    came = sum(traces["throughput"]["from storage"]["y"]) * part * 1e9
    assert came == pytest.approx(sum(sum(rank["received_bytes"]) for rank in timeline["ranks"]))
    assert [traces["slots"][f"rank {rank}"]["y"] for rank in (0, 1)] == [
        list(rank["slots_in_use"]) for rank in timeline["ranks"]
    ]
    assert traces["throughput"]["retries"]["x"] == [pytest.approx(0.1)]
    assert traces["throughput"]["hedged requests"]["x"] == [pytest.approx(0.2)]
    stream = traces["ranks"]["stream"]
    assert [start + length for start, length in zip(stream["base"], stream["x"], strict=True)] == pytest.approx(
        [rank["phases"][-1][2] for rank in timeline["ranks"]]
    )
    assert (traces["kinds"]["needed"]["x"], traces["kinds"]["read beyond need"]["x"]) == ([1.0], [1.0])
    assert traces["costs"]["seconds less"]["x"] == [cost["seconds"] for cost in said["verdict"]["costs"]]


def test_each_chart_has_its_numbers_as_a_table_and_a_link(report):
    page = Page(render_page(report, plotly_js=""))
    ids = {attributes.get("id") for _, attributes in page.tags}
    hrefs = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert all(href.removeprefix("#") in ids for href in hrefs)
    for figure in figures_of(report):
        assert {f"chart-{figure.key}", figure.key} <= ids
        assert f"#{figure.key}" in hrefs
        assert figure.rows
        assert all(len(row) == len(figure.columns) for row in figure.rows)
    assert all(
        attributes.get("tabindex") == "0" for tag, attributes in page.tags if attributes.get("class") == "scroll"
    )


def test_names_from_outside_are_shown_and_do_nothing(report):
    hostile = replace(report, uri=f"s3://bucket/{HOSTILE}", nodes=(HOSTILE, HOSTILE))
    page = Page(render_page(hostile, plotly_js=""))
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.data["report"]["uri"] == hostile.uri
    drawn = json.dumps([trace for figure in page.data["figures"] for trace in figure["traces"]])
    assert "<img" not in drawn
    assert "&lt;img" in drawn


def test_a_page_asks_no_network(report):
    page = Page(render_page(report, plotly_js=""))
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag


def test_a_load_of_which_little_is_known_has_a_page_too(report):
    bare = replace(report, evidence=None, ranks=(), nodes=(), seconds={})
    page = render_page(bare, plotly_js="")
    assert "No word on what bounded the load" in page


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(lambda said: [said], "has no list of ranks", id="a list"),
        pytest.param(lambda said: said | {"ranks": 3}, "has no list of ranks", id="no ranks"),
        pytest.param(lambda said: said | {"ranks": [3]}, "a rank", id="a rank that is a number"),
        pytest.param(lambda said: {**said, "uri": None}, "'uri'", id="no uri"),
        pytest.param(lambda said: said | {"seconds": {"load": "<b>"}}, "'seconds.load'", id="seconds that are text"),
        pytest.param(
            lambda said: said | {"timeline": {"node": "x"}}, "'timeline.seconds'", id="a timeline without seconds"
        ),
        pytest.param(lambda said: said | {"verdict": {"text": "x"}}, "'verdict.bound'", id="a verdict without a bound"),
    ],
)
def test_what_is_no_report_is_refused(report, damage, told):
    said = json.loads(json.dumps(report.as_dict()))
    with pytest.raises(SettingsError, match=re.escape(told)):
        report_of(damage(said), origin="load.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_without_json_is_refused(content, tmp_path):
    path = tmp_path / "load.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="is no JSON file"):
        read_report(path)


@pytest.mark.parametrize("number", ["9" * 20, "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000], ids=len)
@pytest.mark.parametrize("key", ["needed_bytes", "bytes_read"])
def test_a_number_that_is_no_count_is_refused(report, key, number, tmp_path):
    path = tmp_path / "load.json"
    path.write_text(re.sub(rf'"{key}": \d+', f'"{key}": {number}', json.dumps(report.as_dict())))
    with pytest.raises(SettingsError, match=f"is no report of this version of ray_streamer: .*{key}': "):
        read_report(path)


def browser() -> str:
    pytest.importorskip("plotly", reason="plotly draws the page: pip install 'ray_streamer[report]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("there is no browser: apt-get install chromium")


@pytest.mark.slow
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_a_browser_draws_it_without_an_error(report, tmp_path, window):
    program = browser()
    report.write_html(tmp_path / "load.html")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000")
    command = [program, *options, f"--user-data-dir={tmp_path}/profile", f"--window-size={window}", "--dump-dom"]
    drawn = subprocess.run(
        [*command, f"file://{tmp_path}/load.html"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in drawn.stderr, drawn.stderr
    page = Page(drawn.stdout)
    figures = figures_of(report)
    assert dict(page.tags[0][1]).get("data-drawn") == str(len(figures))
    charts = drawn.stdout.split('class="chart')[1:]
    assert len(charts) == len(figures)
    for figure, chart in zip(figures, charts, strict=True):
        assert 'class="main-svg"' in chart
        num_bars = sum(len(trace["x"]) for trace in figure.traces if trace.get("type") == "bar")
        assert chart.count('class="point"><path') >= num_bars
        assert chart.count('class="js-line"') >= sum(trace.get("mode") == "lines" for trace in figure.traces)
    assert page.values["bytes_read"][0] == report.bytes_read
