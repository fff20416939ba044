"""What could a load leave behind in this process? Its threads, its mapped memory, and open descriptors."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def package_threads() -> list[threading.Thread]:
    """The threads that this package has started and that still run."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ray_streamer")]


def mappings_of(name: str) -> list[str]:
    """The lines of /proc/self/maps that hold `name`, such as "ray_streamer-arena"."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]


def descriptors() -> list[str]:
    """What each open descriptor leads to, in no order: a path, or such as "socket:[123]" and "/memfd:ray_streamer-arena (deleted)"."""
    found: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # that of the listing itself, or one that another thread has closed
    return found
