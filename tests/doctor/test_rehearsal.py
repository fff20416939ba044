"""A doctor loads a part of a checkpoint as a load would load all of it, and reads nothing twice."""

from __future__ import annotations

import itertools
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import ray_streamer
from ray_streamer.api.arguments import Sharding
from ray_streamer.cli import main
from ray_streamer.doctor.examine import examine
from ray_streamer.doctor.rehearsal import Rehearsal, rehearse, sample_bytes
from ray_streamer.doctor.rehearsed_ranks import load_all_parts, load_part
from ray_streamer.doctor.sample import SampledSlices, sample_tensors
from ray_streamer.doctor.storage_speed import measure_storage
from ray_streamer.errors import ClusterError
from ray_streamer.rank.request import LoadRequest
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import TensorSpec, llama_layout, write_checkpoint

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Eight tensors of 1 MiB in each of two files."""
    tensors = [TensorSpec(f"model.layers.{layer}.mlp.up_proj.weight", "F32", (256, 1024)) for layer in range(16)]
    return write_checkpoint(tmp_path_factory.mktemp("even"), tensors, num_files=2)


def request_of(uri, *, tp=1, **settings):
    mesh = Mesh(tp=tp)
    slices = RuleSlices(mesh=mesh, rules=ShardRules({"*": Split(0)}))
    return LoadRequest(uri=str(uri), mesh=mesh, slices=slices, settings=Settings.resolve(**settings), device="cpu")


@pytest.mark.parametrize(
    ("max_bytes", "num_tensors"),
    [(1, 2), (2 * MIB, 2), (4 * MIB, 4), (8 * MIB, 8), (16 * MIB, 16), (1 << 40, 16)],
    ids=["one-of-each-file", "one-MiB-each", "two-each", "half", "all", "more-than-all"],
)
def test_a_sample_takes_a_stretch_of_each_file(checkpoint, max_bytes, num_tensors):
    index = request_of(checkpoint).open_index()
    is_sampled = sample_tensors(index, max_bytes)
    # A stretch whose middle is inside of a tensor takes parts of one more.
    assert num_tensors <= is_sampled.sum() <= num_tensors + len(index.files)
    for file in range(len(index.files)):
        rows = np.flatnonzero(is_sampled & (index.file_ids == file))
        assert len(rows)
        assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1)), "side by side"
        before, after = (
            rows[0] - np.flatnonzero(index.file_ids == file)[0],
            np.flatnonzero(index.file_ids == file)[-1] - rows[-1],
        )
        assert abs(before - after) <= 1, "in the middle"


@pytest.mark.parametrize(
    ("place", "rows"), [(0.0, [0, 1]), (1 / 6, [0, 1, 2]), (0.5, [3, 4]), (5 / 6, [5, 6, 7]), (1.0, [6, 7])]
)
def test_a_stretch_lies_where_it_is_wanted(checkpoint, place, rows):
    """So that several of them are apart, where the file has room for that; none leaves its file."""
    index = request_of(checkpoint).open_index()
    is_sampled = sample_tensors(index, 4 * MIB, place)
    for file in range(len(index.files)):
        assert np.flatnonzero(is_sampled[index.file_ids == file]).tolist() == rows
    assert sample_tensors(index, 1 << 40, place).all()


def test_a_sample_of_a_checkpoint_without_tensors_is_empty(tmp_path):
    write_checkpoint(tmp_path, [])
    assert not len(sample_tensors(request_of(tmp_path).open_index(), MIB))


@pytest.mark.parametrize("tp", [1, 2])
def test_results_are_those_that_come_out_of_sampled_tensors_alone(tmp_path, tp):
    """Among them fused ones, of several tensors; each is there as a whole or not at all."""
    layout = llama_layout(256, 4, 8, 4, 1024, 4001)
    write_checkpoint(tmp_path, layout.tensors, num_files=2, config=layout.config)
    request = Sharding(tp=tp, fuse=True).request(str(tmp_path), settings=Settings(), device="cpu")
    index = request.open_index()
    names = {name: row for row, name in enumerate(index.names)}
    whole, part = request.slices(index, 0), SampledSlices(request.slices, index.total_bytes // 2)(index, 0)
    is_sampled = sample_tensors(index, index.total_bytes // 2)
    assert 0 < len(part.results) < len(whole.results)
    assert any("qkv" in name for name in part.results.names), names
    for number, spec in enumerate(part.results):
        there = whole.results.names.index(spec.name)
        assert whole.results[there] == spec
        mine, theirs = (
            sorted(
                (int(said.tensor_ids[row]), said.patterns[said.pattern_ids[row]], int(said.target_offsets[row]))
                for row in np.flatnonzero(said.result_ids == position)
            )
            for said, position in ((part, number), (whole, there))
        )
        assert mine == theirs
        assert all(is_sampled[tensor] for tensor, _, _ in mine)


def test_a_rank_loads_its_part(checkpoint):
    request = request_of(checkpoint)
    part = replace(request, slices=SampledSlices(request.slices, 4 * MIB))
    told = load_part(part, f"rehearsal-{os.getpid()}", 0)
    rehearsal = Rehearsal.of([told], RequestedSettings.of(request.settings))
    assert 4 * MIB <= rehearsal.delivered_bytes <= 6 * MIB
    assert rehearsal.delivered_bytes == told.statistics.bytes_delivered
    assert rehearsal.seconds > 0
    assert rehearsal.seconds_for(2 * rehearsal.delivered_bytes) == pytest.approx(
        rehearsal.start_seconds + 2 * rehearsal.seconds
    )


def test_tensors_without_bytes_are_no_rehearsal(tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (0, 4))])
    request = request_of(tmp_path)
    assert (
        Rehearsal.of([load_part(request, f"nothing-{os.getpid()}", 0)], RequestedSettings.of(request.settings)) is None
    )


@pytest.mark.parametrize(
    ("rate", "available", "expected"),
    [(1e6, 1 << 40, 64 * MIB), (500 * MIB, 1 << 40, 1000 * MIB), (1e12, 1 << 40, 2 << 30), (1e12, 1 << 30, 128 * MIB)],
    ids=["slow", "usual", "fast", "little-memory"],
)
def test_two_seconds_are_rehearsed_as_far_as_memory_allows(rate, available, expected):
    assert sample_bytes(rate, available_bytes=available) == expected


class Noting:
    """A storage of a local folder that takes down what is read, and where it went."""

    def __init__(self, storage):
        self._storage = storage
        self._lock = threading.Lock()
        self.reads = []

    def read_into(self, path, extent, buffer, **keywords):
        address = np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0]
        with self._lock:
            self.reads.append((path, extent.start, extent.stop, (address - extent.start) % 4096))
        self._storage.read_into(path, extent, buffer, **keywords)


@pytest.mark.parametrize("block_bytes", [MIB, 256 << 10, 640 << 10])
def test_no_byte_is_read_twice_and_memory_lies_as_disks_want_it(tmp_path, block_bytes):
    """What was read before may be in a cache; memory that lies elsewhere would be read through the page cache."""
    write_checkpoint(tmp_path, [TensorSpec(f"{n}.weight", "F32", (24 * 256, 1024)) for n in range(2)], num_files=2)
    request = request_of(tmp_path)
    storage = Noting(open_storage(str(tmp_path), request.settings))
    measured = measure_storage(storage, request.open_index(), block_bytes=block_bytes, num_streams=(1, 2, 4))
    assert {each.block_bytes for each in measured} > {block_bytes}
    reads = sorted(storage.reads)
    for (path, _, stop, offset), (next_path, start, _, _) in itertools.pairwise(reads):
        assert path != next_path or stop <= start
        assert offset == 0


def test_a_rehearsal_that_takes_too_long_is_ended(checkpoint, monkeypatch):
    monkeypatch.setattr("ray_streamer.doctor.rehearsal._WAIT_SECONDS", 0.001)
    with pytest.raises(ClusterError, match=r"the ranks of a rehearsed load were not done within 0\.001 s"):
        rehearse(request_of(checkpoint, tp=2), max_bytes=MIB)


def test_ranks_that_never_began_are_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(
        ClusterError, match=r"the ranks of a rehearsed load ended with exit code 1 before they were done"
    ):
        rehearse(request_of(checkpoint, tp=2), max_bytes=MIB)


# From Python 3.12 on; the process that the doctor starts has no threads but those that libraries know to leave behind.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@forks
def test_a_rank_that_ends_without_a_word_is_named(checkpoint, monkeypatch):
    def end(request, session_name, rank):
        os._exit(7 if rank else 0)

    monkeypatch.setattr("ray_streamer.doctor.rehearsed_ranks.load_part", end)
    with pytest.raises(ClusterError, match=r"rank 0 of a rehearsed load ended with exit code 0 before it was done"):
        load_all_parts(request_of(checkpoint, tp=2), "ends")


@forks
def test_every_rank_of_a_try_is_a_process_of_its_own(checkpoint):
    request = request_of(checkpoint, tp=2)
    part = replace(request, slices=SampledSlices(request.slices, 4 * MIB))
    told = load_all_parts(part, f"apart-{os.getpid()}")
    traces = [RankTrace.from_bytes(rank.trace) for rank in told]
    assert [trace.rank for trace in traces] == [0, 1]
    assert 4 * MIB <= sum(rank.statistics.bytes_delivered for rank in told) <= 6 * MIB


def test_the_try_in_the_middle_is_believed(checkpoint, monkeypatch):
    def tries(request, *, max_bytes):
        seconds = (3.0, 9.0, 4.0)
        return tuple(
            Rehearsal(delivered_bytes=16 * MIB, seconds=each, start_seconds=1.0, bound=f"{each:g}", cpu_seconds=0.0)
            for each in seconds
        )

    monkeypatch.setattr("ray_streamer.doctor.examine.rehearse", tries)
    examination = examine(request_of(checkpoint), devices=Path("/nowhere"))
    assert examination.rehearsed_seconds == (4.0, 5.0, 10.0)
    assert (examination.prediction.seconds, examination.prediction.bound) == (5.0, "4")
    assert examination.rehearsal.seconds == 4.0


@pytest.mark.slow
def test_all_ranks_rehearse_side_by_side(checkpoint):
    """Two processes that import torch."""
    result = CliRunner().invoke(main, ["doctor", str(checkpoint), "--tp", "2", "--rule", "*=split:0", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rehearsal, prediction = found["rehearsal"], found["prediction"]
    whole = sum(
        rank.result_bytes for rank in ray_streamer.plan(str(checkpoint), tp=2, rules={"*": Split(0)}).summary().ranks
    )
    assert rehearsal["delivered_bytes"] == whole, "less than two seconds"
    assert prediction["seconds"] == pytest.approx(rehearsal["start_seconds"] + rehearsal["seconds"])
    assert len(found["rehearsed_seconds"]) == 3
    assert prediction["seconds"] == sorted(found["rehearsed_seconds"])[1]
    assert prediction["bound"] == rehearsal["bound"]


@pytest.mark.slow
def test_what_a_rank_meets_in_a_rehearsal_is_a_finding(checkpoint, tmp_path, monkeypatch):
    """The folder is empty by then."""
    request = request_of(checkpoint)
    shown = []

    def fails(part, *, max_bytes):
        missing = replace(part, uri=str(tmp_path))
        try:
            return rehearse(missing, max_bytes=max_bytes)
        except Exception as error:
            shown.append(error)
            raise

    monkeypatch.setattr("ray_streamer.doctor.examine.rehearse", fails)
    examination = examine(request, devices=Path("/nowhere"))
    (error,) = [finding for finding in examination.findings if finding.level == "error"]
    assert error.subject == "rehearsal"
    assert error.found == str(shown[0])
    assert examination.rehearsal is None
    assert examination.prediction is not None
