"""Loads in real control groups with little memory: what fits is never killed, and what does not is refused before it is read.

Ranks join a group when they have imported everything, so that only what a load takes is charged to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_streamer.rank.host_room import SPARE_BYTES
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import llama_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
TENSOR_BYTES = 2 * (4 * 4 * 1024 * 1024 + 4 * 3 * 1024 * 2816 + 2 * 8000 * 1024 + 9 * 1024)
"""Of the checkpoint, in bfloat16."""
BESIDE_BYTES = SPARE_BYTES + 10 * MIB
"""What a rank counts beside its tensors, blocks of 8 MiB and page tables among it."""

RANK = """
import json, os, sys
import ray_streamer, torch
from ray_streamer.errors import RayStreamerError
from ray_streamer.settings import Settings

uri, group, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
settings = Settings.resolve(page_cache="off", direct_io="off", block_bytes="8MiB", concurrency=32, memory_limit="1GiB")
options |= {"settings": settings, "session": f"{os.getppid()}"}
held, times = None, options.pop("times", 1)
if options.pop("again", False):
    held = ray_streamer.load_rank(uri, **options)
else:
    ray_streamer.load_rank(uri, rules={"*": ray_streamer.Skip()}, **options)  # everything is imported
with open(os.path.join(group, "cgroup.procs"), "w") as members:
    members.write(str(os.getpid()))
seen = []
try:
    for _ in range(times - 1):
        ray_streamer.load_rank(uri, **options)
    tensors = ray_streamer.load_rank(uri, out=held, on_statistics=seen.append, **options)
    print("loaded", sum(tensor.nbytes for tensor in tensors.values()), seen[0].peak_staging_bytes)
except RayStreamerError as error:
    print(type(error).__name__, error)
"""


class MemoryGroup:
    """A control group with a limit of memory; no swap, where that can be said."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        is_version_1 = (folder / "memory.limit_in_bytes").exists()
        self._events = folder / ("memory.oom_control" if is_version_1 else "memory.events")
        names = ("limit_in_bytes", "memsw.limit_in_bytes") if is_version_1 else ("max", "swap.max")
        for name, value in zip(names, (limit_bytes, limit_bytes if is_version_1 else 0), strict=True):
            if (folder / f"memory.{name}").exists():
                (folder / f"memory.{name}").write_text(str(value))

    @property
    def num_killed(self) -> int:
        """Processes that the kernel has ended for want of memory."""
        return int(dict(line.split() for line in self._events.read_text().splitlines())["oom_kill"])

    def close(self) -> None:
        """Removes it; its last process may still be on its way out."""
        for _ in range(100):
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.05)
            else:
                return


def _places() -> Iterator[Path]:
    """Folders below which this process may be able to make groups, which leaves it within all limits that it has."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield Path("/sys/fs/cgroup/memory") / path.strip("/")
        elif not controllers:
            own = Path("/sys/fs/cgroup") / path.strip("/")
            for folder in (own, *own.parents):
                control = folder / "cgroup.subtree_control"
                if control.exists() and "memory" in control.read_text().split():
                    yield folder


@contextmanager
def memory_group(limit_bytes: int, name: str = "") -> Iterator[MemoryGroup]:
    for place in _places():
        folder = place / f"ray_streamer-test-{os.getpid()}{name}"
        try:
            folder.mkdir()
        except OSError:
            continue
        group = MemoryGroup(folder, limit_bytes)
        try:
            yield group
        finally:
            group.close()
        return
    pytest.skip(
        "no control group with a limit of memory can be made here: it takes root, and cgroups that are writable"
    )


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    layout = llama_layout(hidden=1024, layers=4, heads=16, kv_heads=16, intermediate=2816, vocab=8000)
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout.tensors, config=layout.config))


def outcomes(uri: str, groups: list[MemoryGroup], **options: object) -> list[str]:
    """What became of one rank in each of the groups."""
    import json

    size = len(groups)
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                uri,
                str(group.folder),
                json.dumps({"rank": at, "world_size": size} | options),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for at, group in enumerate(groups)
    ]
    return [rank.communicate(timeout=280)[0].strip() or f"killed: {rank.returncode}" for rank in ranks]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_load_that_cannot_fit_is_refused_before_it_is_read(uri: str, dtype: str | None) -> None:
    tensor_bytes = TENSOR_BYTES * (2 if dtype else 1)
    with memory_group(tensor_bytes + 4 * MIB) as group:
        (outcome,) = outcomes(uri, [group], dtype=dtype)
        assert group.num_killed == 0, outcome
        assert outcome.startswith("BudgetError node "), outcome
        assert f"rank 0 would take {tensor_bytes / MIB:.0f} MiB for tensors" in outcome
        assert f"control group {group.folder} are left; raise that limit" in outcome


def test_a_load_that_fits_stages_in_what_is_left(uri: str) -> None:
    # A cast brings every block through staging memory, for which 40 slots of 8 MiB are allowed, and useful.
    with memory_group(2 * TENSOR_BYTES + BESIDE_BYTES + 24 * MIB) as group:
        (outcome,) = outcomes(uri, [group], dtype="float32")
        assert group.num_killed == 0, outcome
        word, num_bytes, staged = outcome.split()
        assert (word, int(num_bytes)) == ("loaded", 2 * TENSOR_BYTES)
        assert 8 * MIB <= int(staged) <= 48 * MIB


def test_ranks_of_one_group_share_its_limit(uri: str) -> None:
    with memory_group(TENSOR_BYTES) as group:
        found = outcomes(uri, [group, group])
        assert group.num_killed == 0, found
        assert all("2 ranks together would take" in outcome for outcome in found), found
        assert found[0].startswith("BudgetError")
        assert len({outcome.split(", and ")[0] for outcome in found}) == 1


def test_a_group_of_one_rank_is_named_by_all(uri: str) -> None:
    with memory_group(TENSOR_BYTES // 4, "-small") as small, memory_group(TENSOR_BYTES, "-large") as large:
        found = outcomes(uri, [large, small])
        assert small.num_killed == large.num_killed == 0, found
        assert all("BudgetError" in outcome and f"control group {small.folder} " in outcome for outcome in found), found
        assert all("rank 1 would take" in outcome for outcome in found), found


def test_tensors_that_are_there_need_no_room_again(uri: str) -> None:
    with memory_group(BESIDE_BYTES + 8 * MIB) as group:
        (outcome,) = outcomes(uri, [group], again=True)
        assert group.num_killed == 0, outcome
        assert outcome.startswith("loaded"), outcome


def test_memory_of_tensors_that_were_dropped_is_used_again(uri: str) -> None:
    # Malloc keeps much of it, and counts for the group.
    with memory_group(TENSOR_BYTES + BESIDE_BYTES + 24 * MIB) as group:
        (outcome,) = outcomes(uri, [group], times=4)
        assert group.num_killed == 0, outcome
        assert outcome.startswith("loaded"), outcome
