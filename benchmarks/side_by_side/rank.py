"""What does one rank do? It imports, waits for the word, loads once, says what that took, and what it holds.

    python -m side_by_side.rank

Lines of JSON come and go on standard input and output:

    task        ->  {"ready": true}, when everything is imported
    anything    ->  {"started", "stopped", "load_cpu_seconds", "cpu_seconds", "disk_bytes"}, when the load is over
    anything    ->  {"digest"}

or {"missing": module} or {"error": text} instead of an answer. Seconds are those of the monotonic clock, which all processes of a machine
share. The load is over when one byte of every page of every tensor was read, so that who leaves tensors mapped to a file reads it, too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from side_by_side.loaders import LOADERS
from side_by_side.parts import digest, read_every_page
from side_by_side.task import Task


def main() -> None:
    """Serves one task."""
    # What libraries print is no answer.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        try:
            for answer in _serve():
                answers.write(json.dumps(answer) + "\n")
        except ModuleNotFoundError as error:
            answers.write(json.dumps({"missing": error.name}) + "\n")
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
    # Others may still be asked for their digest, and libraries that end take their time.
    sys.stdin.readline()
    os._exit(0)


def _serve() -> Any:
    task = Task.from_json(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_cap_bytes, task.memory_cap_bytes))
    loader = LOADERS[task.loader](task)
    yield {"ready": True}
    sys.stdin.readline()
    disk_bytes, cpu_seconds, started = _disk_bytes(), _cpu_seconds(), time.monotonic()
    tensors = loader.load()
    read_every_page(tensors)
    stopped = time.monotonic()
    yield {
        "started": started,
        "stopped": stopped,
        "load_cpu_seconds": _cpu_seconds() - cpu_seconds,
        "cpu_seconds": _cpu_seconds(),
        "disk_bytes": _disk_bytes() - disk_bytes,
    }
    sys.stdin.readline()
    yield {"digest": digest(tensors)}


def _cpu_seconds() -> float:
    """Of this process so far, all its threads, and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _disk_bytes() -> int:
    """What the disk was asked for on behalf of this process, read-ahead included."""
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
