"""Limits of a real process, set low: each refusal is a typed error that names the limit, its value and the way out."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from ray_streamer.errors import BudgetError, SettingsError
from ray_streamer.process_limits import limit_met, limits_explained, pids_limit

PROGRAM = """
import json, os, resource, sys, threading
import numpy, torch
import ray_streamer
from ray_streamer.errors import RayStreamerError
from ray_streamer.settings import Settings

folder = sys.argv[1]
settings = Settings.resolve(memory_limit="8MiB", block_bytes="64KiB", concurrency=64, page_cache="off", direct_io="off")
options = {"rules": {"*": ray_streamer.Replicate()}, "settings": settings}
ray_streamer.load_rank(folder, **options)  # everything is imported


def load(limit, extra, user):
    used = {
        "RLIMIT_NOFILE": len(os.listdir("/proc/self/fd")) - 1,
        "RLIMIT_AS": int(open("/proc/self/statm").read().split()[0]) * 4096,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 0,
    }[limit]
    resource.setrlimit(getattr(resource, limit), (used + extra,) * 2)
    if user:
        os.setuid(user)
    try:
        ray_streamer.load_rank(folder, **options)
        outcome = "loaded"
    except RayStreamerError as error:
        outcome = f"{type(error).__name__} {error}"
    except BaseException as error:
        outcome = f"UNTYPED {type(error).__name__} {error}"
    print(outcome)
    print(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("ray_streamer")), flush=True)


# A process for each case, without another import of torch.
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        load(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def folder():
    """A checkpoint that other users may read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        save_file({"w": np.zeros((64, 1 << 16), "f4")}, f"{name}/model.safetensors")
        os.chmod(f"{name}/model.safetensors", 0o644)
        yield name


@pytest.fixture(scope="module")
def load(folder):
    """Loads in a process of its own whose `limit` allows `extra` more than what is used; what came of it."""
    # Forking is what it is for; other threads of that process hold nothing that a child needs.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(limit, extra, *, user=0):
            print(json.dumps([limit, extra, user]), file=server.stdin, flush=True)
            outcome, threads, code = (server.stdout.readline().strip() for _ in range(3))
            assert code == "0"
            assert threads == "[]", "threads are left"
            return outcome

        yield run


@pytest.mark.parametrize("extra", [0, 1, 2, 3])
def test_few_descriptors_are_enough_or_named(load, extra):
    outcome = load("RLIMIT_NOFILE", extra)
    assert outcome == "loaded" or ("Error" in outcome and "`ulimit -n`" in outcome), outcome
    assert "UNTYPED" not in outcome
    assert extra > 0 or outcome.startswith(("StorageError", "BudgetError"))


PAIR = """
import os, resource, sys
import numpy, torch
import ray_streamer
from ray_streamer.errors import RayStreamerError
from ray_streamer.settings import Settings

settings = Settings.resolve(memory_limit="8MiB", block_bytes="64KiB", page_cache="off", startup_timeout_seconds=3)
options = {"rules": {"*": ray_streamer.Replicate()}, "settings": settings, "world_size": 2}
ray_streamer.load_rank(sys.argv[1], rules={"*": ray_streamer.Replicate()})  # everything is imported
for extra in (0, 2, 6):
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            if rank:
                used = len(os.listdir("/proc/self/fd")) - 1
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + extra,) * 2)
            try:
                ray_streamer.load_rank(sys.argv[1], rank=rank, session=f"{os.getppid()}-{extra}", **options)
                os._exit(0)
            except RayStreamerError:
                os._exit(1)
            except BaseException as error:
                os.write(2, f"rank {rank} +{extra}: {type(error).__name__} {error}\\n".encode())
                os._exit(2)
        pids.append(pid)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
"""


def test_a_rank_with_few_descriptors_ends_its_neighbours_load_by_name(folder):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PAIR, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stderr
    outcomes = [line.split() for line in run.stdout.splitlines()]
    assert len(outcomes) == 3
    assert {code for pair in outcomes for code in pair} <= {"0", "1"}, run.stderr
    assert all(first == second for first, second in outcomes), "one rank loaded where the other could not"
    assert outcomes[0] == ["1", "1"]


@pytest.mark.parametrize("extra_mib", [1, 24])
def test_a_little_address_space_is_named(load, extra_mib):
    outcome = load("RLIMIT_AS", extra_mib << 20)
    assert outcome.startswith("BudgetError"), outcome
    assert "`ulimit -v`" in outcome
    assert "raise it, or lower" in outcome


def test_too_few_threads_are_named(load):
    if os.geteuid():
        pytest.skip("root makes a user without threads; nobody else can")
    outcome = load("RLIMIT_NPROC", 0, user=61234)
    assert outcome.startswith("BudgetError"), outcome
    assert "no thread can be started: the limit is 0 for threads of this user (`ulimit -u`)" in outcome
    assert "lower concurrency" in outcome


def test_files_limited_in_size_limit_staging(load):
    outcome = load("RLIMIT_FSIZE", 1 << 20)
    assert outcome == "loaded" or ("1 MiB (`ulimit -f`): raise it" in outcome and outcome.startswith("BudgetError"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, ""), r"`ulimit -n` allows, \d+: raise it \(up to"),
        (OSError(errno.ENFILE, ""), "fs.file-max allows: raise it"),
        (OSError(errno.ETOOMANYREFS, ""), r"on their way to other processes as `ulimit -n`"),
        (OSError(errno.ENOMEM, ""), "no memory is left: .*lower memory_limit"),
        (MemoryError(), "no memory is left"),
        (RuntimeError("can't start new thread"), "no thread can be started: .*lower concurrency"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "no memory is left"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "no memory is left"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), r"`ulimit -n` allows, \d+"),
    ],
    ids=["files", "machine", "under-way", "memory", "python", "threads", "torch", "library", "library-files"],
)
def test_limits_are_explained_and_keep_their_cause(error, words):
    with pytest.raises(BudgetError, match=f"^cannot try: .*{words}") as caught, limits_explained("try"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("other"),
        SettingsError("own"),
        ImportError("no such"),
        KeyError("k"),
    ],
)
def test_other_errors_pass(error):
    assert limit_met(error) is None
    with pytest.raises(type(error)) as caught, limits_explained("try"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("groups", "path", "limit"),
    [
        ("0::/job\n", "job", "300"),
        ("5:pids:/job\n4:memory:/other\n", "pids/job", "300"),
        ("0::/elsewhere\n", "job", None),
        ("0::/job\n", "job", "max"),
    ],
)
def test_threads_of_a_container(tmp_path, groups, path, limit):
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / "pids.max").write_text(f"{limit or 300}\n")
    assert pids_limit(tmp_path / "cgroup", tmp_path) == (limit if limit != "max" else None)
    assert pids_limit(tmp_path / "nothing", tmp_path) is None


def test_unlimited_values_are_not_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr("ray_streamer.process_limits.pids_limit", lambda: None)
    assert limit_met(MemoryError()) == "no memory is left: lower memory_limit"
    assert "kernel.threads-max" in (limit_met(RuntimeError("can't start new thread")) or "")
