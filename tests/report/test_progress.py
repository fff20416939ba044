"""What people see of a load: a bar where somebody looks, lines in a log, and how much longer it will take."""

from __future__ import annotations

import io
import os
import threading

import pytest
from rich.console import Console

import ray_streamer
from ray_streamer.report.progress import LoadProgress, ProgressSoFar, progress_line
from ray_streamer.storage.base import StorageStatistics
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

GIB = 1 << 30


@pytest.fixture
def rank_at(constructed, statistics_of):
    """A rank that has so many bytes of so many."""

    def made(delivered, wanted, *, num_retries=0):
        storage = StorageStatistics(num_retries=num_retries)
        trace = constructed(num_blocks=1).trace()
        return statistics_of(trace, bytes_delivered=delivered, bytes_to_deliver=wanted, storage=storage)

    return made


class Written(io.StringIO):
    """A log that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._has_grown = threading.Condition()

    def write(self, text: str) -> int:
        with self._has_grown:
            written = super().write(text)
            self._has_grown.notify_all()
        return written

    def wait_for(self, words: str) -> None:
        with self._has_grown:
            assert self._has_grown.wait_for(lambda: words in self.getvalue(), 60), self.getvalue()


def test_bytes_of_all_ranks_are_added_and_done_ones_counted(rank_at):
    reached = ProgressSoFar.of([rank_at(3 * GIB, 4 * GIB, num_retries=2), rank_at(4 * GIB, 4 * GIB)])
    assert reached == ProgressSoFar(7 * GIB, 8 * GIB, 2, 1, 2)
    assert reached.notes == "1 of 2 ranks done, 2 retries"


def test_a_total_is_known_when_every_rank_has_its_plan(rank_at):
    reached = ProgressSoFar.of([rank_at(3 * GIB, 4 * GIB), None])
    assert reached.all_bytes == 0
    assert progress_line(reached, 1.0) == "3 GiB, 3.22 GB/s, 0 of 2 ranks done"


def test_retries_are_told_when_there_are_any(rank_at):
    assert ProgressSoFar.of([rank_at(1, 2)]).notes == ""
    assert ProgressSoFar.of([rank_at(1, 2, num_retries=1)]).notes == "1 retry"


def test_a_finished_load_has_nothing_left(rank_at):
    assert progress_line(ProgressSoFar.of([rank_at(GIB, GIB)]), 1.0) == "1 GiB of 1 GiB, 1.07 GB/s"


def test_a_slow_load_has_a_rate_that_is_not_zero(rank_at):
    reached = ProgressSoFar.of([rank_at(20_000_000, 28_000_000)])
    assert progress_line(reached, 10.0) == "19.1 MiB of 26.7 MiB, 2 MB/s, 4 s left"
    assert ", 0.2 kB/s, " in progress_line(reached, 1e5)


@pytest.mark.parametrize(
    ("phase", "words"),
    [("ray", "starting Ray, or connecting to it"), ("start", "starting the ranks' processes"), ("plan", "ranks meet")],
)
def test_phases_before_the_first_byte_have_lines_in_a_log(phase, words):
    log = Written()
    with LoadProgress("s3://b/m", console=Console(file=log, width=300), seconds_between_lines=0.001) as progress:
        progress.phase(phase)
        log.wait_for(f"s3://b/m: {words}")
    assert log.getvalue().startswith("ray_streamer: s3://b/m: ")
    assert "\x1b" not in log.getvalue(), "a log is no terminal"


def test_before_the_first_phase_a_line_has_the_seconds_alone():
    assert LoadProgress("m", console=Console(file=Written())).line() == "ray_streamer: m: 0 s"


def test_a_terminal_has_a_bar_with_the_phase_and_what_is_done(rank_at):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with LoadProgress("s3://b/m", console=console) as progress:
        progress.phase("load")
        progress([rank_at(GIB, 2 * GIB), rank_at(2 * GIB, 2 * GIB)])
    assert "s3://b/m (loading)" in screen.getvalue()
    assert "3.0/4.0 GiB" in screen.getvalue()
    assert "1 of 2 ranks done" in screen.getvalue()


def test_a_terminal_that_cannot_draw_has_lines(rank_at, monkeypatch):
    """As the shell of an editor, and that of some build servers."""
    monkeypatch.setenv("TERM", "dumb")
    log = Written()
    console = Console(file=log, force_terminal=True, width=300)
    with LoadProgress("m", console=console, ask=lambda: [rank_at(GIB, GIB)], seconds_between_lines=0.001):
        log.wait_for("1 GiB of 1 GiB")


def test_a_name_that_a_terminal_would_obey_is_shown_escaped():
    log = Written()
    progress = LoadProgress("s3://b/\x1b[2J[bold]", console=Console(file=log))
    assert "\\x1b[2J[bold]" in progress.line()


def test_who_is_asked_need_not_be_told(rank_at):
    log = Written()
    console = Console(file=log, width=300)
    with LoadProgress("m", console=console, ask=lambda: [rank_at(GIB, GIB)], seconds_between_lines=0.001):
        log.wait_for("1 GiB of 1 GiB")


def test_load_rank_shows_the_first_ranks_part(tmp_path, monkeypatch):
    shown = []
    enter = LoadProgress.__enter__

    def entered(progress):
        shown.append(progress)
        return enter(progress)

    monkeypatch.setattr(LoadProgress, "__enter__", entered)
    write_checkpoint(tmp_path, [TensorSpec("scale", "F32", (1024,))])
    rules = {"*": ray_streamer.Split(0)}
    ray_streamer.load_rank(str(tmp_path), rank=0, world_size=1, rules=rules, progress=True)
    (progress,) = shown
    assert progress._is_over.is_set()
    assert not any(thread.name == "ray_streamer-progress" for thread in threading.enumerate())
    ray_streamer.load_rank(str(tmp_path), rank=0, world_size=1, rules=rules)
    assert shown == [progress], "only where it was asked for"


class ClosedPipe(io.StringIO):
    """A pipe whose reader is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.was_tried = threading.Event()

    def flush(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            os.write(writer, b"text")
        finally:
            os.close(writer)
            self.was_tried.set()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_load_goes_on_when_nobody_can_see_it_any_more(rank_at, caplog, is_terminal):
    pipe = ClosedPipe()
    with LoadProgress(
        "model", console=Console(file=pipe, force_terminal=is_terminal), seconds_between_lines=0.0
    ) as bar:
        bar([rank_at(1, 3)])
        assert pipe.was_tried.wait(30)
        bar.phase("load")
    assert "the load goes on" in caplog.text
