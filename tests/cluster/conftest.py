"""What tests of groups wait for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# No measure of anything: a busy machine takes long.
HANG_SECONDS = 120.0


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Poll a condition until it holds."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"not so within {HANG_SECONDS} s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def assert_gone(wait_until: Callable[[Callable[[], bool]], None]) -> Callable[[Iterable[int]], None]:
    """Every one of these processes ends."""

    def check(pids: Iterable[int]) -> None:
        alive = list(pids)
        assert alive
        wait_until(lambda: not any(_is_running(pid) for pid in alive))

    return check


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
