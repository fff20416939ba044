"""Are verdicts right, and what are their predictions worth? Six loads that are slow on purpose, each then loaded again as advised.

    python benchmarks/verdict.py [--rounds 3] [--megabytes 64] [--json FILE]

Two ranks in processes of their own load one checkpoint, from a local S3 server through a proxy that makes something slow, or from files in
the page cache. The verdict on that load names what bounded it, and predicts a load with its advice, or without that cost. Then that load
is made. Every case is run once in every round; prints medians, of the seconds and of the gain alone: what the first load took, less what
the second one took. Where the gain is a small part of a load, the checkpoint is larger, so that it can be told from the difference of any
two loads. Linux, CPU only; a machine that is busy with other work makes all of it vary.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fault_process import FaultProcess
from met_ranks import meet
from rich.console import Console
from rich.table import Table
from slow_loads import CASES, MIB, Case, Size

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.rank.request import LoadRequest
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.faults import Fault
from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from ray_streamer.report.verdict.judge import Verdict
    from ray_streamer.testing.s3_server import S3Server

NUM_RANKS = 2
NUM_FAULTS_PLANNED = 20_000
GOAL = 0.25
RUNS_SECONDS = 0.005


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

    @property
    def predicted_gain(self) -> float | None:
        """Seconds that the change was to save."""
        return None if self.predicted is None else self.measured - self.predicted

    @property
    def measured_gain(self) -> float:
        """Seconds that it saved."""
        return self.measured - self.then_measured


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
        meet(worker, request, rank=rank, session=session, memory_limit=limit)
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


def run_case(case: Case, ranks: Ranks, proxy: FaultProcess, uris: dict[Size, str]) -> Outcome:
    """The load, its verdict, and the load that it predicts."""
    uri = uris[case.size]
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
    if not case.slow_rank:
        return ranks.load(uri, said, proxy, case.faults, again=False)
    with held_up(ranks.processes[1].pid):
        return ranks.load(uri, said, proxy, case.faults, again=False)


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
    table = Table(title="Verdicts, and what came: medians; errors of the predicted seconds, and of the gain alone")
    headings = (
        "case",
        "verdict",
        "measured",
        "replayed",
        "change",
        "predicted",
        "then measured",
        "error",
        "gain",
        "error of it",
    )
    for column in (*headings, f"within {GOAL:.0%}"):
        table.add_column(column, overflow="fold")
    for name, found in outcomes.items():
        case = next(case for case in CASES if case.name == name)
        is_right = sum(outcome.bound in case.bounds for outcome in found)
        table.add_row(
            name,
            f"{', '.join(sorted({outcome.bound for outcome in found}))} ({is_right} of {len(found)} right)",
            f"{median(outcome.measured for outcome in found):.2f} s",
            f"{median(outcome.replayed for outcome in found):.2f} s",
            "; ".join(sorted({outcome.change for outcome in found})),
            *told_of_predictions(found),
        )
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def told_of_predictions(found: list[Outcome]) -> list[str]:
    """The columns from `predicted` on."""
    then = f"{median(outcome.then_measured for outcome in found):.2f} s"
    errors = [outcome.error for outcome in found if outcome.error is not None]
    gains = [outcome.predicted_gain for outcome in found if outcome.predicted_gain is not None]
    if not errors:
        return ["nothing", then, "", "", "", "missed"]
    error = median(errors)
    gain = median(outcome.measured_gain for outcome in found)
    # Of medians: the gain of one round may be close to nothing.
    gain_error = median(gains) / gain - 1
    is_met = max(abs(error), abs(gain_error)) <= GOAL
    predicted = median(outcome.predicted for outcome in found if outcome.predicted is not None)
    return [
        f"{predicted:.2f} s",
        then,
        f"{error:+.0%}",
        f"{gain:.2f} s",
        f"{gain_error:+.0%}",
        "both" if is_met else "seconds" if abs(error) <= GOAL else "missed",
    ]


def make_checkpoint(root: Path, size: Size, *, megabytes: int, server: S3Server) -> str:
    """The uri of its one file, since proxies of this kind pass no listings on."""
    name = f"{'local' if size.is_local else 's3'}-{size.times}"
    folder = write_checkpoint(root / name, [TensorSpec("up_proj.weight", "F32", (size.times * megabytes * 64, 4096))])
    (file,) = folder.glob("*.safetensors")
    place = str(folder) if size.is_local else server.upload_folder(folder, f"verdicts-{size.times}", "model")
    return f"{place}/{file.name}"


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the checkpoint; two cases have a larger one")
    parser.add_argument("--json", type=Path, help="every outcome goes there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verdict-") as root, start_s3_server() as server:
        os.environ |= server.environment()
        sizes = {case.size for case in CASES}
        uris = {size: make_checkpoint(Path(root), size, megabytes=arguments.megabytes, server=server) for size in sizes}
        ranks = Ranks()
        outcomes: dict[str, list[Outcome]] = {case.name: [] for case in CASES}
        with FaultProcess(server.endpoint_url) as proxy:
            ranks.load(uris[Size(1, False)], {"s3_endpoint_url": proxy.url}, proxy, (Fault(),), again=False)
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
