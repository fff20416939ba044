"""Files that a load is reported to: asked for before the load without a trace, written after it through links, errors typed."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

import ray_streamer
from ray_streamer.errors import SettingsError
from ray_streamer.report.output_file import check_file, is_same_file, open_output
from ray_streamer.report.trace import LoadTrace
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint


@pytest.fixture
def named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@contextmanager
def descriptor_path(descriptor):
    """The path of a descriptor, which is closed at the end."""
    try:
        yield Path(f"/dev/fd/{descriptor}")
    finally:
        os.close(descriptor)


def written(path, text="report\n"):
    with open_output(path) as stream:
        stream.write(text)


def test_a_check_leaves_nothing_behind(tmp_path):
    check_file(tmp_path / "new")
    (tmp_path / "link").symlink_to("target")
    check_file(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert (tmp_path / "link").readlink() == Path("target")


def test_a_check_changes_nothing(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    check_file(tmp_path / "old")
    check_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("target", ["old", "new"])
def test_files_are_written_through_links(tmp_path, target):
    (tmp_path / "old").write_text("a longer text than the report\n")
    (tmp_path / "link").symlink_to(target)
    written(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / target).read_text() == "report\n"


def test_a_loop_of_links_is_an_error_and_stays(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels") as failed:
        check_file(tmp_path / "loop")
    assert failed.value.errno == errno.ELOOP
    assert (tmp_path / "loop").is_symlink()


def test_a_named_pipe_is_refused_without_a_reader(named_pipe):
    with pytest.raises(OSError, match="named pipe"):
        check_file(named_pipe)


def test_load_rank_refuses_a_named_pipe_before_the_load(named_pipe, tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("scale", "F32", (1024,))])
    with pytest.raises(SettingsError, match=r"trace='.*/pipe' cannot be written: it is a named pipe"):
        ray_streamer.load_rank(
            str(tmp_path), rank=0, world_size=1, rules={"*": ray_streamer.Split(0)}, trace=named_pipe
        )


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_devices_are_accepted(device):
    check_file(Path(device))


def test_a_pipe_without_a_name_stays_open(tmp_path):
    reader, writer = os.pipe()
    with descriptor_path(reader), descriptor_path(writer) as path:
        check_file(path)
        (tmp_path / "link").symlink_to(path)
        written(tmp_path / "link", "one\n")
        written(path, "two\n")
        assert os.read(reader, 100) == b"one\ntwo\n"


def test_a_named_pipe_that_this_process_writes_to_is_accepted(named_pipe):
    reader = os.open(named_pipe, os.O_RDONLY | os.O_NONBLOCK)
    with descriptor_path(reader), descriptor_path(os.open(named_pipe, os.O_WRONLY)) as path:
        check_file(path)
        written(path)
        assert os.read(reader, 100) == b"report\n"


def test_a_file_behind_a_descriptor_keeps_what_it_has(tmp_path):
    descriptor = os.open(tmp_path / "stdout", os.O_WRONLY | os.O_CREAT)
    with descriptor_path(descriptor) as path:
        os.write(descriptor, b"before\n")
        check_file(path)
        written(path)
        os.write(descriptor, b"after\n")
    assert (tmp_path / "stdout").read_text() == "before\nreport\nafter\n"


def test_a_descriptor_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "input").touch()
    with descriptor_path(os.open(tmp_path / "input", os.O_RDONLY)) as path, pytest.raises(OSError, match="for reading"):
        check_file(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        check_file(path)


def write_trace(path, _):
    LoadTrace(uri="m", phases=(), ranks=(), offsets=(), epoch_seconds=0.0).write(path)


def write_html(path, report):
    pytest.importorskip("plotly", reason="plotly draws the page: pip install 'ray_streamer[report]'")
    report.write_html(path)


@pytest.mark.parametrize("write", [write_trace, write_html])
def test_a_file_that_cannot_be_written_is_a_typed_error_that_names_it(write, constructed, report_on, tmp_path):
    report = report_on(constructed().trace())
    with pytest.raises(SettingsError, match=r"^/dev/full cannot be written: No space left on device$") as full:
        write(Path("/dev/full"), report)
    assert isinstance(full.value.__cause__, OSError)
    folder = tmp_path / "none"
    with pytest.raises(SettingsError, match=f"No such file or directory; the folder {re.escape(str(folder))} does not"):
        write(folder / "file", report)


def test_one_file_is_known_by_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("new")
    for other in ("new", "./new", "link", tmp_path / "new"):
        assert is_same_file(Path("new"), Path(other))
    assert not is_same_file(Path("new"), Path("other"))
    (tmp_path / "new").touch()
    os.link("new", "hard")
    for other in ("new", "link", "hard"):
        assert is_same_file(Path("new"), Path(other))
    assert not is_same_file(Path("new"), Path("other"))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/dev/stdout", "/dev/stderr"])
def test_devices_and_descriptors_take_several_outputs(path):
    assert not is_same_file(Path(path), Path(path))
