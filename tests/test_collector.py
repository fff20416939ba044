"""The collector is off within blocks, whatever their order, and afterwards it is as it was."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from ray_streamer.collector import collector_paused


def test_it_is_off_for_the_length_of_a_block_even_of_one_that_fails():
    def fail() -> None:
        with collector_paused():
            with collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError

    assert gc.isenabled()
    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()


def test_the_last_of_several_threads_switches_it_on():
    entered, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with collector_paused():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=pause)
    thread.start()
    assert entered.wait(30)
    with collector_paused():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


FORKED = """
import gc, os, signal, threading
from ray_streamer.collector import collector_paused

held, over = threading.Event(), threading.Event()

def hold():
    with collector_paused():
        held.set()
        over.wait()

def pause_often():
    while not over.is_set():
        with collector_paused():
            pass

threads = [threading.Thread(target=hold), *(threading.Thread(target=pause_often) for _ in range(2))]
for thread in threads:
    thread.start()
held.wait()
ends = []
for _ in range(50):
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        was_enabled = gc.isenabled()
        with collector_paused():
            is_off = not gc.isenabled()
        os._exit(0 if was_enabled and is_off and gc.isenabled() else 1)
    ends.append(os.waitpid(pid, 0)[1])
over.set()
for thread in threads:
    thread.join()
print(set(ends), gc.isenabled())
"""


def test_a_forked_process_has_it_on_whatever_other_threads_do():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "{0} True\n"


KEPT = """
import gc, sys
from ray_streamer.exchange.liveness import Activity
from ray_streamer.staging.stop import StopSignal
from ray_streamer.rank.device_start import DeviceStart

def open_device():
    import torch
    return torch

assert "torch" not in sys.modules
owns_process = sys.argv[1] == "own"
start = DeviceStart(open_device, wants_staging=False, timeout_seconds=120, owns_process=owns_process)
start.wait(StopSignal(), Activity())
assert gc.isenabled()
print(gc.get_freeze_count())
"""


@pytest.mark.parametrize("kind", ["own", "callers"])
def test_only_in_processes_of_its_own_torch_is_left_out_for_good(kind):
    done = subprocess.run([sys.executable, "-c", KEPT, kind], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    num_kept = int(done.stdout)
    assert num_kept > 50_000 if kind == "own" else num_kept == 0
