"""Are verdicts right, and what are their predictions worth? Six loads that are slow on purpose, each then loaded again as advised.

    python benchmarks/verdict.py [--rounds 3] [--megabytes 64] [--json FILE]

Two ranks in processes of their own load one checkpoint, from a local S3 server through a proxy that makes something slow, or from files in
the page cache. The verdict on that load names what bounded it, and predicts a load with its advice, or without that cost. Then that load
is made. Every case is run once in every round; prints medians. Linux, CPU only; a machine that is busy with other work makes all of it vary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from met_ranks import meet
from rich.console import Console
from rich.table import Table

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.rank.request import LoadRequest
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.fault_process import FaultProcess
from ray_streamer.testing.faults import Fault
from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from ray_streamer.report.verdict.judge import Verdict

MIB = 1 << 20
NUM_RANKS = 2
NUM_FAULTS_PLANNED = 20_000
GOAL = 0.25
RUNS_SECONDS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load that is slow on purpose.

    Attributes:
        name: What makes it slow.
        bounds: What the verdict may name.
        then: What is loaded next: as the verdict advises; without what makes it slow; or into the same tensors.
        faults: What requests meet, in turn, again and again.
        settings: Of the load.
        is_local: Whether files of the page cache are loaded.
        slow_rank: Whether rank 1 runs a fifth of the time.
    """

    name: str
    bounds: tuple[str, ...]
    then: Literal["advice", "without", "again"]
    faults: tuple[Fault, ...] = (Fault(),)
    settings: dict[str, Any] = field(default_factory=dict)
    is_local: bool = False
    slow_rank: bool = False


CASES = (
    Case(
        name="storage throttled: 5 MB/s for each stream",
        bounds=("stream rate", "bandwidth"),
        then="advice",
        faults=(Fault(bytes_per_second=5e6),),
    ),
    Case(name="first byte of 200 ms", bounds=("first byte",), then="advice", faults=(Fault(delay_seconds=0.2),)),
    Case(
        name="one slow rank: has a fifth of its CPU",
        bounds=("straggler",),
        then="without",
        faults=(Fault(delay_seconds=0.02),),
        slow_rank=True,
    ),
    Case(
        name="memory for one slot, first byte of 20 ms",
        bounds=("slots",),
        then="advice",
        faults=(Fault(delay_seconds=0.02),),
        settings={"memory_limit": 0},
    ),
    Case(
        name="503 on 5% of requests, 256 KiB each",
        bounds=("throttling",),
        then="without",
        # Enough requests that the waits after 503s are more than chance.
        settings={"block_bytes": MIB // 4},
        faults=(*(Fault(),) * 10, Fault(status=503), *(Fault(),) * 9),
    ),
    Case(name="everything in the page cache", bounds=("first touch", "copies"), then="again", is_local=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was said, and what came.

    Attributes:
        bound: What the verdict named.
        measured: Seconds of reading and copying.
        replayed: The same by its replay.
        change: What was changed then.
        predicted: Seconds for that; None when nothing was predicted.
        then_measured: Seconds that it took.
    """

    bound: str
    measured: float
    replayed: float
    change: str
    predicted: float | None
    then_measured: float

    @property
    def error(self) -> float | None:
        """Of the prediction, over what came."""
        return None if self.predicted is None else self.predicted / self.then_measured - 1


def rank_main(rank: int, pipe: Connection) -> None:
    """One rank: loads what it is told to, and says what happened."""
    import torch  # noqa: F401  # imported by the first load, it would be what bounds that load

    worker = None
    while (told := pipe.recv()) is not None:
        uri, said, session, again = told
        settings = Settings.resolve(**said)
        mesh = Mesh(tp=NUM_RANKS)
        slices = RuleSlices(mesh=mesh, rules=ShardRules({"*": Split(1)}))
        request = LoadRequest(uri=uri, mesh=mesh, slices=slices, settings=settings, device="cpu")
        limit = settings.memory_limit if settings.memory_limit is not None else 64 * MIB
        if worker is None or not again:
            worker = LoadWorker(rank, request)
        meet(worker, request, session=session, memory_limit=limit)
        # The proxy's faults begin here.
        pipe.send(None)
        pipe.recv()
        statistics = worker.load()
        pipe.send((worker.trace().to_bytes(), statistics))
        if not again:
            worker.close()


class Ranks:
    """The processes of all ranks."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(NUM_RANKS):
            here, there = spawn.Pipe()
            process = spawn.Process(target=rank_main, args=(rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def load(
        self, uri: str, said: dict[str, Any], proxy: FaultProcess, faults: tuple[Fault, ...], *, again: bool
    ) -> Verdict:
        """One load of all ranks, and the verdict on it."""
        session = secrets.token_hex(8)
        for pipe in self.pipes:
            pipe.send((uri, said, session, again))
        for pipe in self.pipes:
            pipe.recv()
        proxy.plan_faults(faults * (NUM_FAULTS_PLANNED // len(faults)))
        for pipe in self.pipes:
            pipe.send(None)
        told = [pipe.recv() for pipe in self.pipes]
        proxy.plan_faults(())
        traces = [RankTrace.from_bytes(trace) for trace, _ in told]
        verdict = judge(traces, [statistics for _, statistics in told], RequestedSettings.of(Settings.resolve(**said)))
        assert verdict is not None
        return verdict

    def close(self) -> None:
        """Ends them."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def run_case(case: Case, ranks: Ranks, proxy: FaultProcess, uris: dict[str, str]) -> Outcome:
    """The load, its verdict, and the load that it predicts."""
    uri = uris["local" if case.is_local else "s3"]
    said = {"s3_endpoint_url": proxy.url, "block_bytes": MIB, "concurrency": 4, "hedge_percent": 0.0} | case.settings
    # What is slow at the first load of these processes is slow by that.
    first = slow_load(case, ranks, proxy, uri, said)
    if case.then == "advice":
        change = dict(first.advice.settings) if first.advice else {}
        predicted = first.advice.seconds if first.advice else None
        then = slow_load(case, ranks, proxy, uri, said | change)
        text = ", ".join(f"{name}={value}" for name, value in change.items()) or "no advice"
    else:
        kinds = case.bounds if case.then == "without" else ("first touch",)
        saved = next((cost.seconds for cost in first.costs if cost.kind in kinds), None)
        predicted = None if saved is None else first.measured_seconds - saved
        again = case.then == "again"
        faults = tuple(Fault(delay_seconds=fault.delay_seconds) for fault in case.faults if not fault.status)
        then = ranks.load(uri, said, proxy, faults, again=again)
        text = "same memory again" if again else "without it"
    return Outcome(
        bound=first.bound,
        measured=first.measured_seconds,
        replayed=first.replayed_seconds,
        change=text,
        predicted=predicted,
        then_measured=then.measured_seconds,
    )


def slow_load(case: Case, ranks: Ranks, proxy: FaultProcess, uri: str, said: dict[str, Any]) -> Verdict:
    """A load under what makes it slow."""
    again = case.then == "again"
    if not case.slow_rank:
        return ranks.load(uri, said, proxy, case.faults, again=again)
    with held_up(ranks.processes[1].pid):
        return ranks.load(uri, said, proxy, case.faults, again=again)


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    """A process that runs a fifth of the time, in slices, as beside other work on its CPU."""
    is_over = threading.Event()

    def hold_up() -> None:
        while not is_over.wait(RUNS_SECONDS):
            os.kill(pid, signal.SIGSTOP)
            is_over.wait(4 * RUNS_SECONDS)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=hold_up, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)


def show(outcomes: dict[str, list[Outcome]]) -> None:
    """The table."""
    table = Table(title="Verdicts, and what came")
    for column in ("case", "verdict", "measured", "replayed", "change", "predicted", "then measured", "error", "goal"):
        table.add_column(column, overflow="fold")
    for name, found in outcomes.items():
        errors = [outcome.error for outcome in found if outcome.error is not None]
        predicted = [outcome.predicted for outcome in found if outcome.predicted is not None]
        case = next(case for case in CASES if case.name == name)
        is_right = sum(outcome.bound in case.bounds for outcome in found)
        is_met = bool(errors) and abs(median(errors)) <= GOAL
        table.add_row(
            name,
            f"{', '.join(sorted({outcome.bound for outcome in found}))} ({is_right} of {len(found)} right)",
            f"{median(outcome.measured for outcome in found):.2f} s",
            f"{median(outcome.replayed for outcome in found):.2f} s",
            "; ".join(sorted({outcome.change for outcome in found})),
            f"{median(predicted):.2f} s" if predicted else "nothing",
            f"{median(outcome.then_measured for outcome in found):.2f} s",
            f"{median(errors):+.0%}" if errors else "",
            "met" if is_met else "missed",
        )
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--megabytes", type=int, default=64, help="size of the checkpoint; of the local one, four times that"
    )
    parser.add_argument("--json", type=Path, help="every outcome goes there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verdict-") as root, start_s3_server() as server:
        os.environ |= server.environment()
        uris = {}
        for name, size in (("s3", arguments.megabytes), ("local", 4 * arguments.megabytes)):
            folder = write_checkpoint(Path(root, name), [TensorSpec("up_proj.weight", "F32", (size * 64, 4096))])
            (file,) = folder.glob("*.safetensors")
            place = str(folder) if name == "local" else server.upload_folder(folder, "verdicts", "model")
            # A file, since proxies of this kind pass no listings on.
            uris[name] = f"{place}/{file.name}"
        ranks = Ranks()
        outcomes: dict[str, list[Outcome]] = {case.name: [] for case in CASES}
        with FaultProcess(server.endpoint_url) as proxy:
            ranks.load(uris["s3"], {"s3_endpoint_url": proxy.url}, proxy, (Fault(),), again=False)
            for _ in range(arguments.rounds):
                for case in CASES:
                    outcomes[case.name].append(run_case(case, ranks, proxy, uris))
        ranks.close()
    show(outcomes)
    if arguments.json is not None:
        said = {name: [asdict(outcome) for outcome in found] for name, found in outcomes.items()}
        arguments.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
