"""What are the doctor's predictions worth? It examines a load, the load is made at once, and both are compared.

    python benchmarks/doctor.py [--rounds 5] [--places s3 disk-cold] [--megabytes 1024] [--tp 2] [--json FILE]

Each round and place has a fresh process for the doctor (the command as people type it) and fresh processes for the ranks of the load. Places: files
in the page cache; files of a disk, dropped from the page cache before the doctor and before the load; a local S3 server over HTTP. What is
compared is what the doctor predicts: from the moment that all ranks have started and imported torch until the last byte is in its tensor.
Prints medians, and how many of the rounds were within 15%.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from met_ranks import meet
from rich.console import Console
from rich.table import Table

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

RULES = {"*.down_proj.weight": Split(1), "*": Split(0)}
GOAL = 0.15
DOCTOR_SECONDS = 300
NUM_FILES = 4
TITLES = {"page-cache": "page cache", "disk-cold": "disk, cold", "s3": "S3"}
"""Every place, by the name that the command line takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One prediction, and the load that followed.

    Attributes:
        predicted: Seconds, by the doctor.
        measured: Seconds of the load.
        predicted_bound: What would bound it, by the doctor.
        rehearsed: Seconds by each of its rehearsals, the shortest first.
    """

    predicted: float
    measured: float
    predicted_bound: str
    rehearsed: tuple[float, ...]

    @property
    def error(self) -> float:
        """Of the prediction, over what came."""
        return self.predicted / self.measured - 1


def rank_main(rank: int, num_ranks: int, uri: str, session: str, pipe: Connection) -> None:
    """One rank: loads once, and says what it took."""
    import torch  # noqa: F401  # it is no part of what is predicted

    mesh = Mesh(tp=num_ranks)
    slices = RuleSlices(mesh=mesh, rules=ShardRules(RULES))
    request = LoadRequest(uri=uri, mesh=mesh, slices=slices, settings=Settings.resolve(), device="cpu")
    worker = LoadWorker(rank, request)
    meet(worker, request, rank=rank, session=session, memory_limit=256 << 20)
    pipe.send(None)
    pipe.recv()
    pipe.send(sum(worker.load().seconds.values()))
    worker.close()


def load(uri: str, num_ranks: int) -> float:
    """Seconds of a load by fresh processes."""
    spawn, session = multiprocessing.get_context("spawn"), secrets.token_hex(8)
    pipes, processes = [], []
    for rank in range(num_ranks):
        here, there = spawn.Pipe()
        process = spawn.Process(target=rank_main, args=(rank, num_ranks, uri, session, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    seconds = max(pipe.recv() for pipe in pipes)
    for process in processes:
        process.join(30)
    return seconds


def examine(uri: str, num_ranks: int) -> dict[str, Any]:
    """What the doctor says, as JSON."""
    command = [
        sys.executable,
        "-c",
        "from ray_streamer.cli import main; main()",
        "doctor",
        uri,
        "--tp",
        str(num_ranks),
        "--json",
    ]
    rules = ["--rule", "*.down_proj.weight=split:1", "--rule", "*=split:0", "--memory-limit", "256MiB"]
    answer = subprocess.run([*command, *rules], stdout=subprocess.PIPE, check=True, timeout=DOCTOR_SECONDS)
    return json.loads(answer.stdout)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Writes back what is not on the disk yet, and lets go of clean pages."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bring_into_page_cache(files: Iterable[Path]) -> None:
    """Reads all of them."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(8 << 20)
            while opened.readinto(buffer):
                pass


def compare(place: str, uri: str, files: list[Path], num_ranks: int) -> Compared:
    """One prediction and one load."""
    prepare = {"disk-cold": drop_from_page_cache, "page-cache": bring_into_page_cache}.get(place)
    if prepare is not None:
        prepare(files)
    found = examine(uri, num_ranks)
    if prepare is not None:
        prepare(files)
    measured = load(uri, num_ranks)
    prediction = found["prediction"]
    return Compared(
        predicted=prediction["seconds"],
        measured=measured,
        predicted_bound=prediction["bound"],
        rehearsed=tuple(found["rehearsed_seconds"]),
    )


def show(compared: dict[str, list[Compared]]) -> None:
    """The table."""
    table = Table(title="The doctor's predictions, and the loads that followed")
    for column in ("place", "bound", "predicted", "measured", "error", "each", f"within {GOAL:.0%}"):
        table.add_column(column, overflow="fold")
    for place, found in compared.items():
        errors = [each.error for each in found]
        table.add_row(
            TITLES[place],
            ", ".join(sorted({each.predicted_bound for each in found})),
            f"{median(each.predicted for each in found):.2f} s",
            f"{median(each.measured for each in found):.2f} s",
            f"{median(errors):+.0%}",
            ", ".join(f"{error:+.0%}" for error in errors),
            f"{sum(abs(error) <= GOAL for error in errors)} of {len(errors)}",
        )
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)


def main() -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the checkpoint")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else where temporary files lie")
    parser.add_argument("--json", type=Path, help="every comparison goes there")
    arguments = parser.parse_args()
    layers = range(max(1, arguments.megabytes // 32))
    tensors = [
        TensorSpec(f"model.layers.{layer}.mlp.{name}.weight", "F32", (1024, 4096))
        for layer in layers
        for name in ("up_proj", "down_proj")
    ]
    compared: dict[str, list[Compared]] = {place: [] for place in arguments.places}
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=arguments.folder) as root, start_s3_server() as server:
        os.environ |= server.environment()
        folder = write_checkpoint(Path(root), tensors, num_files=NUM_FILES)
        files = sorted(folder.glob("*.safetensors"))
        in_s3 = server.upload_folder(folder, "doctor", "model")
        for _ in range(arguments.rounds):
            for place, found in compared.items():
                found.append(compare(place, in_s3 if place == "s3" else str(folder), files, arguments.tp))
                print(f"{TITLES[place]}: {found[-1]}", file=sys.stderr, flush=True)
    show(compared)
    if arguments.json is not None:
        said = {place: [asdict(each) for each in found] for place, found in compared.items()}
        arguments.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
