"""What does it cost a load to take down what happens? Loads with and without a recorder, side by side.

    python benchmarks/recorder.py [--rounds 15] [--megabytes 512] [--json FILE]

    unrecorded   a recorder that takes down nothing; no load can be asked for it, so it is put in the recorder's place here
    recorded     every load as it is
    traced       and its trace is collected afterwards, as by every load under Ray
    judged       and a verdict is found, as when a report is asked for one

Each contender is one process that stays, on one rank; they load in turn, each round in another order, into the same tensors again and again.
Blocks of 256 KiB, the smallest that a load makes, so that there is as much to take down as there can be; and of 8 MiB, as usual.
CPU seconds are those of the process during the load. Prints medians, and the median of the rounds' ratios with the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from met_ranks import meet
from rich.console import Console
from rich.table import Table

import ray_streamer.rank.load
from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.rank.recorder import Recorder
from ray_streamer.rank.request import LoadRequest
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from ray_streamer.rank.block_source import Way
    from ray_streamer.rank.recorder import Step

CONTENDERS = ("unrecorded", "recorded", "traced", "judged")
BLOCKS = (256 << 10, 8 << 20)
STAGING_BYTES = 64 << 20


class TakesDownNothing(Recorder):
    """What a recorder costs when it is not there."""

    def mark(self, step: Step, block: int) -> None:
        """Nothing."""

    def came(self, way: Way, block: int) -> None:
        """Nothing."""

    def landed(self, block: int, num_bytes: int, *, taken_bytes: int, touch_seconds: float = 0.0) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One load.

    Attributes:
        seconds: Wall time.
        cpu_seconds: User and system time of the process.
    """

    seconds: float
    cpu_seconds: float


def serve(contender: str, pipe: Connection) -> None:
    """Loads what it is told to, and says what it cost."""
    import torch  # noqa: F401  # imported by the first load, it would be part of that load

    if contender == "unrecorded":
        ray_streamer.rank.load.Recorder = TakesDownNothing
    workers: dict[tuple[str, int], LoadWorker] = {}
    while (told := pipe.recv()) is not None:
        uri, block_bytes = told
        settings = Settings.resolve(block_bytes=block_bytes, hedge_percent=0.0)
        mesh = Mesh(tp=1)
        slices = RuleSlices(mesh=mesh, rules=ShardRules({"*": Split(0)}))
        request = LoadRequest(uri=uri, mesh=mesh, slices=slices, settings=settings, device="cpu")
        worker = workers.setdefault(told, LoadWorker(0, request))
        meet(worker, request, rank=0, session=secrets.token_hex(8), memory_limit=STAGING_BYTES)
        began, cpu_began = time.perf_counter(), time.process_time()
        statistics = worker.load()
        if contender in ("traced", "judged"):
            trace = RankTrace.from_bytes(worker.trace().to_bytes())
            if contender == "judged":
                assert judge([trace], [statistics], RequestedSettings.of(settings)) is not None
        pipe.send(Cost(seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu_began))


class Contenders:
    """The processes."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes: list[Any] = []
        for name in CONTENDERS:
            self._pipes[name], theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(name, theirs), daemon=True)
            process.start()
            self._processes.append(process)

    def load(self, name: str, uri: str, block_bytes: int) -> Cost:
        """One load by one of them."""
        self._pipes[name].send((uri, block_bytes))
        return self._pipes[name].recv()

    def close(self) -> None:
        """Ends them."""
        for pipe in self._pipes.values():
            pipe.send(None)
        for process in self._processes:
            process.join(30)


@contextmanager
def places(megabytes: int) -> Iterator[dict[str, str]]:
    """A checkpoint in the page cache, and the same on an S3 server where there is one."""
    with tempfile.TemporaryDirectory(prefix="recorder-") as root, start_s3_server() as server:
        os.environ |= server.environment()
        folder = write_checkpoint(Path(root), [TensorSpec("up_proj.weight", "F32", (megabytes * 64, 4096))])
        yield {"page cache": str(folder), "S3": server.upload_folder(folder, "recorder", "model")}


def measure(contenders: Contenders, uri: str, block_bytes: int, num_rounds: int) -> dict[str, list[Cost]]:
    """All rounds of one place; one before them does not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in CONTENDERS}
    for number in range(num_rounds + 1):
        shift = number % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            cost = contenders.load(name, uri, block_bytes)
            if number:
                costs[name].append(cost)
    return costs


def show(measured: dict[tuple[str, int], dict[str, list[Cost]]]) -> None:
    """The table."""
    table = Table(title="What a recorder costs")
    for column in ("place", "block", "contender", "CPU s", "over unrecorded", "seconds", "over unrecorded "):
        table.add_column(column)
    for (place, block_bytes), costs in measured.items():
        for name in CONTENDERS:
            cells = [place, f"{block_bytes >> 10} KiB", name]
            for field in ("cpu_seconds", "seconds"):
                values = [getattr(cost, field) for cost in costs[name]]
                cells += [
                    f"{median(values):.4f}",
                    _ratio(values, [getattr(cost, field) for cost in costs["unrecorded"]]),
                ]
            table.add_row(*cells)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def _ratio(values: list[float], others: list[float]) -> str:
    ratios = [value / other - 1 for value, other in zip(values, others, strict=True)]
    middle = f"{median(ratios):+.1%}"
    if len(ratios) == 1:
        return middle
    low, _, high = quantiles(ratios, n=4)
    return f"{middle} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the checkpoint")
    parser.add_argument("--json", type=Path, help="every load goes there")
    arguments = parser.parse_args()
    measured: dict[tuple[str, int], dict[str, list[Cost]]] = {}
    with places(arguments.megabytes) as uris:
        contenders = Contenders()
        for place, uri in uris.items():
            for block_bytes in BLOCKS:
                measured[place, block_bytes] = measure(contenders, uri, block_bytes, arguments.rounds)
        contenders.close()
    show(measured)
    if arguments.json is not None:
        said = [
            {
                "place": place,
                "block_bytes": block,
                "costs": {name: [asdict(cost) for cost in some] for name, some in costs.items()},
            }
            for (place, block), costs in measured.items()
        ]
        arguments.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
