"""The collector is off within blocks, whatever their order, and afterwards it is as it was."""

from __future__ import annotations

import gc
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
