"""What do faults cost? One rank loads a checkpoint from a local S3 server through a proxy that fails on purpose.

    python benchmarks/faults.py --rounds 5

Every case is run once in every round, beside the fault-free one. Faults are spread over the requests by a seeded generator, and
hit retries as well. Each load must end with the tensors bit for bit, or with the error that the case expects; and nothing may
be left of it: no thread, no connection. Prints medians.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from fault_process import FaultProcess
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from side_by_side.checkpoint import make_checkpoint

import ray_streamer
from ray_streamer.errors import AccessError, ObjectChangedError, StorageError
from ray_streamer.testing.faults import Fault
from ray_streamer.testing.s3_server import S3Server, start_s3_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_streamer.rank.statistics import RankStatistics

MIB = 1 << 20
NUM_FAULTS_PLANNED = 20_000
NO_FAULT = Fault()


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        name: What goes wrong.
        fault: What a request meets, of which `body_bytes` is drawn anew each time unless it is None.
        share: Of the requests that meet it.
        error_class: What the load must end with; None when it must succeed.
        replaces: Whether an object is replaced in the middle of the load.
    """

    name: str
    fault: Fault = NO_FAULT
    share: float = 0.0
    error_class: type[Exception] | None = None
    replaces: bool = False

    def faults(self, block_bytes: int, seed: int) -> list[Fault]:
        """What each request meets, in order."""
        draw = random.Random(seed)
        return [self._draw(draw, block_bytes) for _ in range(NUM_FAULTS_PLANNED)]

    def _draw(self, draw: random.Random, block_bytes: int) -> Fault:
        if draw.random() >= self.share:
            return NO_FAULT
        if self.fault.body_bytes is None:
            return self.fault
        return replace(self.fault, body_bytes=draw.randrange(block_bytes))


CASES = (
    Case("none"),
    Case("503 SlowDown on 5% of requests", Fault(status=503), 0.05),
    Case("503 SlowDown on 30%", Fault(status=503), 0.3),
    Case("reset in the middle of 5% of bodies", Fault(body_bytes=0, end="reset"), 0.05),
    Case("5% of bodies truncated", Fault(body_bytes=0), 0.05),
    Case("1% of requests never answered", Fault(is_mute=True), 0.01),
    Case("1% of bodies stall", Fault(body_bytes=0, end="stall"), 0.01),
    Case("first byte after 200 ms", Fault(delay_seconds=0.2), 1.0),
    Case("50 MB/s for each connection", Fault(bytes_per_second=50e6), 1.0),
    Case("credentials expired once", Fault(status=400, code="ExpiredToken"), 0.01),
    Case("credentials expired", Fault(status=403, code="ExpiredToken"), 1.0, AccessError),
    Case("bodies of another length", Fault(headers=(("content-length", "1000"),), body_bytes=0), 0.05, StorageError),
    Case("200 instead of 206", Fault(status=200), 0.05, StorageError),
    Case("an object replaced", Fault(delay_seconds=0.05), 1.0, ObjectChangedError, replaces=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load.

    Attributes:
        seconds: Wall time.
        outcome: "bit for bit", or the name of the error.
        num_requests: Ranged requests that the proxy saw.
        num_faults: Of these, those that met a fault.
        counts: The rank's storage statistics; empty after an error.
    """

    seconds: float
    outcome: str
    num_requests: int
    num_faults: int
    counts: dict[str, int] = field(default_factory=dict)


class Campaign:
    """All that the runs share."""

    def __init__(self, options: argparse.Namespace, server: S3Server, proxy: FaultProcess) -> None:
        self._options, self._server, self._proxy = options, server, proxy
        make_checkpoint(options.folder, layers=options.layers)
        self._uri = server.upload_folder(options.folder, "faults", "model")
        self._files = sorted(options.folder.glob("*.safetensors"))
        self._expected = digest(item for file in self._files for item in load_file(file).items())
        self._settings = ray_streamer.Settings(
            s3_endpoint_url=proxy.url,
            block_bytes=options.block_mib * MIB,
            concurrency=options.concurrency,
            memory_limit=options.concurrency * options.block_mib * MIB,
        )
        self._plan_at = 0

    def run(self, case: Case, seed: int) -> Run:
        """Loads once and looks at what is left."""
        self._proxy.plan_faults(case.faults(self._options.block_mib * MIB, seed))
        told: list[RankStatistics] = []
        replacing = threading.Thread(target=self._replace_an_object)
        if case.replaces:
            replacing.start()
        began = time.perf_counter()
        try:
            tensors = ray_streamer.load_rank(
                self._uri, rank=0, world_size=1, settings=self._settings, on_statistics=told.append
            )
        except StorageError as error:
            seconds, outcome = time.perf_counter() - began, type(error).__name__
            if case.error_class is None or type(error) is not case.error_class:
                raise
        else:
            seconds, outcome = time.perf_counter() - began, "bit for bit"
            if case.error_class is not None or digest(tensors.items()) != self._expected:
                raise SystemExit(f"{case.name}: the load gave other tensors, or should have failed")
        if case.replaces:
            replacing.join()
            self._server.upload_folder(self._options.folder, "faults", "model")
        num_requests, num_faults = self._proxy.counts()
        self._check_nothing_is_left(case)
        counts = asdict(told[0].storage) if told else {}
        return Run(seconds=seconds, outcome=outcome, num_requests=num_requests, num_faults=num_faults, counts=counts)

    def _replace_an_object(self) -> None:
        """In the middle of a load, the one that is read last; by a small one, which is written quickly."""
        client = self._server.client()
        while self._proxy.counts()[0] < 20:
            time.sleep(0.001)
        client.put_object(Bucket="faults", Key=f"model/{self._files[-1].name}", Body=b"another")
        client.close()

    def _check_nothing_is_left(self, case: Case) -> None:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("ray_streamer")]
        port = int(self._proxy.url.rpartition(":")[2])
        connections = [
            connection
            for connection in psutil.Process().net_connections("tcp")
            if connection.raddr and connection.raddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        ]
        if threads or connections:
            raise SystemExit(f"{case.name}: left behind: {threads} {connections}")


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names and bytes, whatever the order."""
    lines = [
        name + hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors
    ]
    return hashlib.blake2b("".join(sorted(lines)).encode()).hexdigest()


def table(runs: dict[str, list[Run]]) -> Table:
    """Medians, and ratios to the fault-free case of the same round."""
    shown = Table(title="one rank through a proxy")
    columns = (
        "fault",
        "outcome",
        "seconds",
        "ratio",
        "requests",
        "faults",
        "retries",
        "hedged",
        "resumed",
        "thrown away",
    )
    for heading in columns:
        shown.add_column(heading, justify="left" if heading in ("fault", "outcome") else "right")
    fault_free = runs["none"]
    for name, measured in runs.items():
        ratio = statistics.median(run.seconds / base.seconds for run, base in zip(measured, fault_free, strict=True))
        shown.add_row(
            name,
            " or ".join(sorted({run.outcome for run in measured})),
            f"{middle(measured, lambda run: run.seconds):.2f}",
            f"{ratio:.2f}x" if measured[0].counts else "-",
            *(f"{middle(measured, count):.0f}" for count in (lambda run: run.num_requests, lambda run: run.num_faults)),
            *(
                f"{middle(measured, lambda run, key=key: run.counts[key]):.0f}" if measured[0].counts else "-"
                for key in ("num_retries", "num_hedges", "num_cuts")
            ),
            f"{middle(measured, lambda run: run.counts['wasted_bytes']) / MIB:.2f} MiB" if measured[0].counts else "-",
        )
    return shown


def middle(runs: list[Run], value: Callable[[Run], Any]) -> float:
    return statistics.median(value(run) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=3, help="about 98 MB each, and 262 MB of embeddings")
    parser.add_argument("--block-mib", type=int, default=2, help="small, so that there are many requests")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(".demo/faults"))
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {case.name: [] for case in CASES}
    with start_s3_server() as server, FaultProcess(server.endpoint_url) as proxy:
        os.environ.update(server.environment())
        campaign = Campaign(options, server, proxy)
        campaign.run(CASES[0], seed=0)
        for turn in range(options.rounds):
            for case in CASES:
                runs[case.name].append(campaign.run(case, seed=turn))
    Console(width=150).print(table(runs))


if __name__ == "__main__":
    main()
