"""The benchmark's tables say what was measured, leave nobody out, and name who took less; a tiny run of it measures what it says."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from side_by_side.contenders import CONTENDERS, OURS
from side_by_side.pages import BEGIN, END, page, with_summary
from side_by_side.places import TITLES
from side_by_side.results import METRICS, Cell, Results, Run
from side_by_side.rounds import make_cells
from side_by_side.tables import HEADINGS, defeats, place_rows, summary_rows

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
FACTS = {
    "date": "2026-11-28 12:00 UTC",
    "processor": "a processor",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "system": "Linux",
    "staging_bytes": 128 * MIB,
    "memory_cap_bytes": 8 << 30,
    "versions": {"Python": "3.11"},
}


def runs_of(*seconds: float) -> list[Run]:
    return [
        Run(
            whole_seconds=3 + load,
            load_seconds=load,
            whole_cpu_seconds=6 + load,
            load_cpu_seconds=load / 2,
            added_bytes=round(load * 100 * MIB),
            read_bytes=2_000_000,
        )
        for load in seconds
    ]


def results_of(*cells: Cell, tp: int = 2) -> Results:
    return Results(
        facts=FACTS,
        checkpoint_bytes=1_000_000,
        tp=tp,
        cells=list(cells),
        load_averages=[0.5, 1.5],
        elapsed_seconds=60.0,
    )


@pytest.fixture
def some_results() -> Results:
    return results_of(
        Cell(place="s3", contender="ray_streamer", tp=1, runs=runs_of(0.25)),
        Cell(place="s3", contender="ray_streamer", tp=2, runs=runs_of(3.0, 1.0, 2.0)),
        Cell(place="s3", contender="another", tp=2, runs=runs_of(4.0, 9.0, 1.0)),
        Cell(place="s3", contender="a third", tp=2, runs=runs_of(1.5, 1.25, 7.0)),
        Cell(place="s3", contender="a fourth", tp=2, reason="reads local files"),
    )


def test_a_row_has_medians_and_ranges(some_results):
    row = place_rows(some_results, "s3")[2]
    assert row[:5] == ["another", "2", "4.00 (1.00-9.00)", "2.00x", "7.00 (4.00-12.00)"]
    assert row[5:] == ["2.00", "10.00", "400", "2.000x"]


def test_who_did_not_load_has_a_row_with_the_reason(some_results):
    assert place_rows(some_results, "s3")[4] == ["a fourth", "2", "reads local files", *[""] * (len(HEADINGS) - 3)]


def test_the_least_of_those_with_as_many_ranks_is_bold(some_results):
    loads = [row[2] for row in place_rows(some_results, "s3")[:4]]
    assert [load.startswith("**") for load in loads] == [False, False, False, True]


def test_who_took_less_is_named_in_every_measure(some_results):
    assert defeats(some_results) == [
        "RADOS Gateway, plain HTTP, load: a third 1.50; ray_streamer 2.00 s",
        "RADOS Gateway, plain HTTP, whole call: a third 4.50; ray_streamer 5.00 s",
        "RADOS Gateway, plain HTTP, CPU of the load: a third 0.75; ray_streamer 1.00 s",
        "RADOS Gateway, plain HTTP, peak memory: a third 150; ray_streamer 200 MiB",
    ]


def test_nobody_is_named_where_we_took_least():
    ours, other = (
        Cell(place="web", contender=name, tp=2, runs=runs_of(at)) for name, at in ((OURS.name, 1.0), ("p", 2.0))
    )
    assert defeats(results_of(ours, other)) == []


def test_the_summary_shows_the_best_of_the_others(some_results):
    assert summary_rows(some_results) == [
        [TITLES["s3"], "2.00", "a third", "1.50", "0.75x", "1.00", "a third", "0.75"],
    ]


def test_the_summary_of_a_place_without_a_server_says_why():
    absent = [Cell(place="web", contender=name, tp=2, reason="nginx not found") for name in ("ray_streamer", "another")]
    assert summary_rows(results_of(*absent))[0][:2] == [TITLES["web"], "nginx not found"]


def test_results_come_back_from_their_json_with_medians_beside_the_runs(some_results, tmp_path):
    some_results.save(tmp_path / "some" / "results.json")
    assert Results.load(tmp_path / "some" / "results.json") == some_results
    assert '"load_seconds": 1.5' in (tmp_path / "some" / "results.json").read_text()


def test_a_page_says_that_other_work_ran(some_results):
    assert "other work ran" not in page(some_results)
    some_results.load_averages.append(9.5)
    assert "0.5 to 9.5, more than the ranks explain: **other work ran on the machine.**" in page(some_results)


def test_the_summary_goes_between_its_marks_and_nowhere_else(some_results):
    text = with_summary(f"before\n{BEGIN}\nold\n{END}\nafter\n", some_results)
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "a third" in text
    assert "old" not in text
    assert with_summary(text, some_results) == text
    with pytest.raises(ValueError, match="side by side: begin"):
        with_summary("nothing", some_results)


def test_the_pages_in_docs_have_the_marks():
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    assert text.index(BEGIN) < text.index(END)


def test_nobody_is_left_out_of_any_place():
    places = dict.fromkeys(TITLES, "not here")
    cells = make_cells(places, contenders=list(CONTENDERS), tp=2, our_tps=[1, 4])
    for place in TITLES:
        found = [(cell.contender, cell.tp) for cell in cells if cell.place == place]
        ours = [(OURS.name, tp) for tp in ((2,) if "web" in place else (1, 2, 4))]
        assert found == [*ours, *((name, 2) for name in list(CONTENDERS)[1:])]
    assert {cell.reason for cell in cells} == {"not here"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # some fifty processes, each of which imports torch
def test_a_tiny_run_measures_and_its_page_says_what_its_json_says(tmp_path):
    json = tmp_path / "results.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "compare.py"), "--layers", "1", "--hidden", "64"]
    places = ["--places", "disk-warm", "s3", "web-tls", "--our-tp", "1", "--rounds", "1"]
    options = [*places, "--folder", str(tmp_path / "model"), "--json", str(json)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = Results.load(json)
    check_what_was_measured(results)
    shown = [[part.strip() for part in line.split("|")[1:-1]] for line in page(results).splitlines() if "|" in line]
    tables = [row for row in shown if len(row) == len(HEADINGS) and row[0] in CONTENDERS]
    assert len(tables) == len(results.cells)
    for row, cell in zip(tables, results.cells, strict=True):
        assert row[:2] == [cell.contender, str(cell.tp)]
        if not cell.runs:
            assert row[2] == cell.reason
            continue
        for column, metric in ((2, "load_seconds"), (4, "whole_seconds"), (5, "load_cpu_seconds")):
            said = re.match(r"\**(\d+\.\d+)", row[column])
            assert said
            assert float(said[1]) == pytest.approx(statistics.median(cell.values(metric)), abs=0.0051)


def check_what_was_measured(results: Results) -> None:
    by_name = {(cell.place, cell.contender, cell.tp): cell for cell in results.cells}
    for cell in results.cells:
        assert cell.reason or all(cell.median(metric) > 0 for metric in METRICS if metric != "read_bytes")
        assert not cell.runs or cell.median("whole_seconds") > cell.median("load_seconds")
    installed = (
        "ray_streamer",
        "safetensors, slices",
        "safetensors, every file whole",
        "torch DCP, HuggingFaceStorageReader",
    )
    assert all(by_name["disk-warm", name, 2].runs for name in (*installed, "transformers, tensor-parallel"))
    if by_name["s3", "ray_streamer", 2].runs:  # a place without its server says so in every row
        ours, boto3 = (by_name["s3", name, 2] for name in ("ray_streamer", "boto3 into memory, then safetensors"))
        # Every rank reads every file there, and of us each byte is read once, besides headers.
        assert boto3.median("read_bytes") > 2 * results.checkpoint_bytes
        assert ours.median("read_bytes") < 1.5 * results.checkpoint_bytes
    if by_name["web-tls", "ray_streamer", 2].runs:
        assert by_name["web-tls", "ray_streamer", 2].median("read_bytes") >= results.checkpoint_bytes


@pytest.mark.slow
def test_pictures_are_drawn(some_results, tmp_path):
    pytest.importorskip("matplotlib")
    from side_by_side.plots import PICTURES, draw

    draw(some_results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")
    }
    assert "another, tp=2" in (tmp_path / "load_seconds.svg").read_text()
    assert "a fourth" not in (tmp_path / "load_seconds.svg").read_text()
