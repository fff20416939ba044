"""A device that comes up beside everything else: on which thread, how its failure is told, and what ends the waiting for it."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import DeviceError, LoadAbortedError, StartupTimeoutError
from ray_streamer.exchange.liveness import Activity
from ray_streamer.rank.device_start import DeviceStart
from ray_streamer.staging.stop import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an actor that has just begun."""
    monkeypatch.delitem(sys.modules, "torch")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """An opening waits for it; set at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def wait(start: DeviceStart, stop: StopSignal | None = None) -> Any:
    return start.wait(stop or StopSignal(), Activity())


def start_of(open_device: Callable[[], Any], *, timeout_seconds: float) -> DeviceStart:
    return DeviceStart(open_device, wants_staging=False, timeout_seconds=timeout_seconds)


def opening(opened_by: list[threading.Thread]) -> Callable[[], Any]:
    def open_device() -> CpuDevice:
        opened_by.append(threading.current_thread())
        return CpuDevice()

    return open_device


def test_the_caller_opens_it_where_torch_is_there() -> None:
    """Torch's current device is the thread's own."""
    opened_by: list[threading.Thread] = []
    assert wait(start_of(opening(opened_by), timeout_seconds=5)).name == "cpu"
    assert opened_by == [threading.current_thread()]


def test_a_thread_of_its_own_opens_it_where_torch_is_to_be_imported(without_torch: None) -> None:
    opened_by: list[threading.Thread] = []
    start = start_of(opening(opened_by), timeout_seconds=5)
    assert wait(start) is wait(start)
    (thread,) = opened_by
    assert thread is not threading.current_thread()
    thread.join()


@pytest.mark.parametrize("error", [DeviceError("no such device"), ImportError("libtorch_cpu.so: cannot open")])
def test_what_it_raises_reaches_whoever_waits(without_torch: None, error: Exception) -> None:
    def fail() -> Any:
        raise error

    start = start_of(fail, timeout_seconds=5)
    with pytest.raises(type(error)) as caught:
        wait(start)
    assert caught.value is error
    assert not start.is_under_way


def test_a_load_that_is_over_does_not_wait_for_it(without_torch: None, held: threading.Event) -> None:
    start = start_of(held.wait, timeout_seconds=60)
    assert start.is_under_way
    stop, reason = StopSignal(), LoadAbortedError("rank 1 failed")
    stop.set(reason)
    with pytest.raises(LoadAbortedError) as caught:
        wait(start, stop)
    assert caught.value is reason


def test_one_that_never_comes_up_is_waited_for_no_longer_than_the_setting(
    without_torch: None, held: threading.Event
) -> None:
    with pytest.raises(StartupTimeoutError, match=r"not imported.* startup_timeout_seconds=0\.1"):
        wait(start_of(held.wait, timeout_seconds=0.1))
