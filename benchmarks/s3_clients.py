"""Side by side: what does it cost to bring objects of an S3 server into memory, and how fast is it?

    python benchmarks/s3_clients.py                         all clients, 1 to 32 streams, plain and TLS
    python benchmarks/s3_clients.py --streams 8 --tls no    one column

Every client runs in a process of its own, one for each number of streams; clients take turns, so that all meet the same
neighbours. CPU seconds are those of the client's process, all its threads, without the server. The first round is compared with the
files byte by byte and does not count; of the others medians are printed. Clients that are not installed (`pip install ".[bench]"`)
are listed as missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from s3_readers import READERS, Task

from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MIB = 1 << 20
GIGA = 10**9
HANG_SECONDS = 120


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures everything, one row of figures for each client, transport and number of streams."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="s3-clients-") as folder, start_s3_server(tls=True) as server:
        sizes = write_objects(Path(folder), options)
        server.upload_folder(folder, "benchmark")
        for is_tls in {"no": [False], "yes": [True], "both": [False, True]}[options.tls]:
            for streams in options.streams:
                task = Task(
                    endpoint_url=str(server.tls_endpoint_url if is_tls else server.endpoint_url),
                    ca_file=str(server.ca_file) if is_tls else None,
                    region=server.region,
                    access_key=server.access_key,
                    secret_key=server.secret_key,
                    bucket="benchmark",
                    sizes=sizes,
                    streams=streams,
                    block_bytes=options.block_mib * MIB,
                )
                rows += [{"tls": is_tls, "streams": streams} | row for row in take_turns(task, folder, options)]
                print(f"{'TLS' if is_tls else 'plain'}, {streams} streams: done", file=sys.stderr, flush=True)
    return rows


def write_objects(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Files whose every block is another one; bytes of each by name."""
    generator = np.random.default_rng(7)
    for number in range(options.objects):
        (folder / f"object-{number}").write_bytes(generator.bytes(options.object_mib * MIB))
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def take_turns(task: Task, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All clients at one number of streams."""
    clients = [Client(name, task, folder) for name in READERS if options.only is None or name in options.only]
    try:
        for _ in range(options.rounds + 1):
            for client in clients:
                client.take_a_turn()
        return [client.figures() for client in clients]
    finally:
        for client in clients:
            client.end()


class Client:
    """One client's process."""

    def __init__(self, name: str, task: Task, folder: str) -> None:
        self._name = name
        self._num_bytes = sum(task.sizes.values())
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, task, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._turns: list[tuple[float, float]] = []
        self._fault = self._answer()

    def take_a_turn(self) -> None:
        """Read everything once."""
        if not self._fault:
            self._pipe.send("go")
            answer = self._answer()
            if isinstance(answer, tuple):
                self._turns.append(answer)
            else:
                self._fault = answer

    def figures(self) -> dict[str, Any]:
        """Medians of all turns but the first, or why there are none."""
        if self._fault:
            return {"client": self._name, "fault": self._fault}
        seconds = [turn[0] for turn in self._turns[1:]]
        cpu_seconds = [turn[1] for turn in self._turns[1:]]
        return {
            "client": self._name,
            "cpu_seconds_per_gb": statistics.median(cpu_seconds) / self._num_bytes * GIGA,
            "gb_per_second": self._num_bytes / GIGA / statistics.median(seconds),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _answer(self) -> Any:
        if not self._pipe.poll(HANG_SECONDS):
            return f"did not answer in {HANG_SECONDS} s"
        try:
            return self._pipe.recv()
        except EOFError:
            return f"its process ended with {self._process.exitcode}"


def _serve(name: str, task: Task, folder: str, pipe: Connection) -> None:
    try:
        reader = READERS[name](task)
    except ModuleNotFoundError as error:
        pipe.send(f"missing: {error.name}")
        return
    except NotImplementedError as error:
        pipe.send(str(error))
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("")
    check = Check(folder, task.sizes)
    while True:
        pipe.recv()
        num_bytes = [0]

        def count(key: str, start: int, data: Any, num_bytes: list[int] = num_bytes) -> None:
            num_bytes[0] += len(data)

        seen = count if check.is_done else check.compare
        cpu_before, before = _cpu_seconds(), time.perf_counter()
        try:
            reader.read_all(seen)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            continue
        seconds, cpu_seconds = time.perf_counter() - before, _cpu_seconds() - cpu_before
        fault = "" if num_bytes[0] == sum(task.sizes.values()) else "read another number of bytes"
        pipe.send(check.finish() if not check.is_done else fault or (seconds, cpu_seconds))


class Check:
    """Whether all bytes of the files were seen, and nothing else."""

    def __init__(self, folder: str, sizes: dict[str, int]) -> None:
        self.is_done = False
        self._files = {key: np.memmap(Path(folder) / key, np.uint8, "r") for key in sizes}
        self._seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._is_right = True

    def compare(self, key: str, start: int, data: Any) -> None:
        """Compare a part of a file."""
        found = np.frombuffer(data, np.uint8)
        self._seen[key].append((start, start + len(found)))
        self._is_right &= np.array_equal(found, self._files[key][start : start + len(found)])

    def finish(self) -> str | tuple[float, float]:
        """What is wrong; figures of no meaning when nothing is."""
        self.is_done = True
        for key, file in self._files.items():
            at = 0
            for start, stop in sorted(self._seen[key]):
                self._is_right &= start == at
                at = stop
            self._is_right &= at == len(file)
        return (0.0, 0.0) if self._is_right else "other bytes than the files have"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def table(rows: list[dict[str, Any]], *, is_tls: bool, streams: list[int]) -> Table:
    """CPU seconds per GB and GB per second, a column for each number of streams."""
    shown = Table(title="TLS" if is_tls else "plain HTTP", caption="CPU s per GB | GB/s")
    shown.add_column("client")
    for number in streams:
        shown.add_column(f"{number} streams", justify="right")
    found = {(row["client"], row["streams"]): row for row in rows if row["tls"] is is_tls}
    for name in dict.fromkeys(client for client, _ in found):
        cells = [found[name, number] for number in streams]
        shown.add_row(
            name,
            *(
                cell["fault"] if "fault" in cell else f"{cell['cpu_seconds_per_gb']:.2f} | {cell['gb_per_second']:.2f}"
                for cell in cells
            ),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tls", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--only", nargs="+", choices=sorted(READERS), help="these clients")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that is not")
    parser.add_argument("--objects", type=int, default=4)
    parser.add_argument("--object-mib", type=int, default=128, help="MiB of each object")
    parser.add_argument("--block-mib", type=int, default=8, help="MiB of each request")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options)
    console = Console(stderr=options.json, width=140)
    for is_tls in sorted({row["tls"] for row in rows}):
        console.print(table(rows, is_tls=is_tls, streams=options.streams))
    if options.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
