"""Side by side, for each store: what does it cost to bring its objects into memory, by this project and by pyarrow?

    python benchmarks/other_stores.py                   Google's emulator, and Azurite where it is installed (`make azurite`)

Each reader runs in a process of its own; both take turns, so that they meet the same neighbours. CPU seconds are those of the reader's
process, for each 10^9 bytes; the servers are emulators, so the rate is theirs and is not printed. The first round warms up and does not
count; of the others medians are printed. Every block is compared with what was written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.arrow import ArrowStorage
from ray_streamer.testing.azurite import ACCOUNT, KEY, azurite, azurite_program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(MIB) * 64
GOOGLE_SERVER = Path(__file__).parents[1] / "tests" / "storage" / "google_server.py"


@contextmanager
def google() -> Iterator[dict[str, str]]:
    """The emulator with one object; gives the variables by which it is found."""
    command = [sys.executable, str(GOOGLE_SERVER)]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as server:
        assert server.stdout
        assert server.stdin
        address = server.stdout.readline().strip()
        write(google_filesystem(address))
        yield {"STORAGE_EMULATOR_HOST": f"http://{address}"}
        server.stdin.close()


@contextmanager
def azure() -> Iterator[dict[str, str]]:
    """Azurite with one blob; gives the variables by which it is found."""
    with azurite(str(azurite_program())) as url:
        azure_filesystem(url).create_dir("models")
        write(azure_filesystem(url))
        said = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url}/{ACCOUNT}"
        yield {"AZURE_STORAGE_CONNECTION_STRING": said, "AZURITE_URL": url}


def google_filesystem(address: str) -> fs.FileSystem:
    """Pyarrow's client of the emulator."""
    return fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=address)


def azure_filesystem(url: str) -> fs.FileSystem:
    """Pyarrow's client of Azurite."""
    places = {f"{kind}_storage_authority": url.removeprefix("http://") for kind in ("blob", "dfs")}
    return fs.AzureFileSystem(ACCOUNT, account_key=KEY, blob_storage_scheme="http", dfs_storage_scheme="http", **places)


def write(filesystem: fs.FileSystem) -> None:
    """One object, which all read."""
    with filesystem.open_output_stream("models/m/a") as stream:
        stream.write(CONTENT)


def open_reader(store: str, reader: str) -> Any:
    """The storage of a reader."""
    scheme = {"google": "gs", "azure": "az"}[store]
    if reader == "ours":
        return open_storage(f"{scheme}://models/m", Settings.resolve(hedge_percent=0))
    if store == "google":
        filesystem = google_filesystem(os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://"))
    else:
        filesystem = azure_filesystem(os.environ["AZURITE_URL"])
    return ArrowStorage(f"{scheme}://models/m", filesystem, "models/m")


def serve(pipe: Connection, store: str, reader: str, options: argparse.Namespace) -> None:
    """One reader: reads everything whenever it is told to, and tells its CPU seconds."""
    storage = open_reader(store, reader)
    etag = storage.size_and_etag("a").etag
    block = options.block_mib * MIB
    extents = [Extent(start, min(start + block, len(CONTENT))) for start in range(0, len(CONTENT), block)]
    slots = [memoryview(bytearray(b"\1" * block)) for _ in range(options.streams)]
    pipe.send("ready")
    while pipe.recv() == "read":
        before = cpu_seconds()
        with ThreadPoolExecutor(options.streams) as pool:

            def read(stream: int) -> None:
                for extent in extents[stream :: options.streams] * options.passes:
                    storage.read_into("a", extent, slots[stream][: extent.num_bytes], etag=etag)

            list(pool.map(read, range(options.streams)))
        seconds = cpu_seconds() - before
        is_right = all(
            slots[at % options.streams] == CONTENT[e.start : e.stop]
            for at, e in enumerate(extents)
            if at >= len(extents) - options.streams
        )
        pipe.send((seconds, is_right))
    storage.close()


def cpu_seconds() -> float:
    """Of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(store: str, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of each reader for 10^9 bytes."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    figures: dict[str, list[float]] = {"ours": [], "pyarrow": []}
    for reader in figures:
        pipes[reader], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, store, reader, options), daemon=True).start()
        assert pipes[reader].recv() == "ready"
    for turn in range(1 + options.rounds):
        for reader, pipe in pipes.items():
            pipe.send("read")
            seconds, is_right = pipe.recv()
            assert is_right, f"{reader} brought other bytes from {store}"
            if turn:
                figures[reader].append(seconds * 1e9 / (len(CONTENT) * options.passes))
    for pipe in pipes.values():
        pipe.send("end")
    return {reader: statistics.median(values) for reader, values in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=8, help="how often all of it is read in one round")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--block-mib", type=int, default=8)
    options = parser.parse_args()
    stores = {"google": google} | ({"azure": azure} if azurite_program() else {})
    print("store    CPU seconds per 10^9 bytes: ours, pyarrow")
    for store, started in stores.items():
        with ExitStack() as stack:
            os.environ.update(stack.enter_context(started()))
            found = measure(store, options)
        print(f"{store:8} {found['ours']:.2f} {found['pyarrow']:.2f}")


if __name__ == "__main__":
    main()
