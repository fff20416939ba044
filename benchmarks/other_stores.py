"""Side by side, for each store: what does it cost to bring its objects into memory, by this project and by others?

    python benchmarks/other_stores.py                   Google's emulator, nginx, and Azurite where it is installed (`make azurite`)

Others are measured where they are installed: pip install obstore gcsfs adlfs aiohttp "runai-model-streamer[gcs,azure]". Each reader runs
in a process of its own; all take turns, so that they meet the same neighbours. CPU seconds are those of the reader's process, for each
10^9 bytes; GB/s are mostly those of the emulators, which share the machine. The first round compares every byte and does not count; of
the others medians are printed.
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
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.arrow import ArrowStorage
from ray_streamer.testing.azurite import ACCOUNT, KEY, azurite, azurite_program
from ray_streamer.testing.certificates import Certificates, make_certificates
from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    Read = Callable[[int, int, memoryview], Any]
    """Start, stop and memory that may be filled; gives the bytes where they landed."""

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(MIB) * 64
GOOGLE_SERVER = Path(__file__).parents[1] / "tests" / "storage" / "google_server.py"

_NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}
http {{ access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl; ssl_certificate {pem}; ssl_certificate_key {pem}; root {folder}; }} }}
"""


@contextmanager
def google() -> Iterator[dict[str, str]]:
    """The emulator with one object; gives the variables by which it is found."""
    command = [sys.executable, str(GOOGLE_SERVER)]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as server:
        assert server.stdout
        assert server.stdin
        url = f"http://{server.stdout.readline().strip()}"
        write(google_filesystem(url))
        # Google's C++ library has a variable of its own.
        yield {"STORAGE_EMULATOR_HOST": url, "CLOUD_STORAGE_EMULATOR_ENDPOINT": url}
        server.stdin.close()


@contextmanager
def azure(certificates: Certificates | None = None) -> Iterator[dict[str, str]]:
    """Azurite with one blob, over TLS with `certificates`; gives the variables by which it is found."""
    trust = {} if certificates is None else trusting(certificates)
    with azurite(str(azurite_program()), certificates and certificates.server_file) as url, _environment(trust):
        azure_filesystem(url).create_dir("models")
        write(azure_filesystem(url))
        said = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url}/{ACCOUNT};"
        yield {"AZURE_STORAGE_CONNECTION_STRING": said, "AZURITE_URL": url, **trust}


@contextmanager
def azure_tls() -> Iterator[dict[str, str]]:
    """The same over TLS."""
    with tempfile.TemporaryDirectory(prefix="azurite-") as name, azure(make_certificates(Path(name))) as variables:
        yield variables


def trusting(certificates: Certificates) -> dict[str, str]:
    """The variables by which clients trust a server with these."""
    return dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(certificates.ca_file))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables beside those that there are, for the length of a `with` block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def web(*, tls: bool = False) -> Iterator[dict[str, str]]:
    """Nginx with one file; gives the variables by which it is found."""
    with tempfile.TemporaryDirectory(prefix="nginx-", dir="/tmp") as name:
        folder, port, tls_port = Path(name), free_port(), free_port()
        certificates = make_certificates(folder)
        (folder / "a").write_bytes(CONTENT)
        pem = certificates.server_file
        (folder / "conf").write_text(_NGINX.format(folder=folder, port=port, tls_port=tls_port, pem=pem))
        with subprocess.Popen(["nginx", "-c", str(folder / "conf")], stderr=subprocess.DEVNULL) as server:
            url = f"https://127.0.0.1:{tls_port}" if tls else f"http://127.0.0.1:{port}"
            try:
                yield {"WEB_URL": url, **trusting(certificates)}
            finally:
                server.terminate()


@contextmanager
def web_tls() -> Iterator[dict[str, str]]:
    """The same over TLS."""
    with web(tls=True) as variables:
        yield variables


def google_filesystem(url: str) -> fs.FileSystem:
    """Pyarrow's client of the emulator."""
    return fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=url.removeprefix("http://"))


def azure_filesystem(url: str) -> fs.FileSystem:
    """Pyarrow's client of Azurite."""
    scheme, _, authority = url.partition("://")
    places = {f"{kind}_storage_authority": authority for kind in ("blob", "dfs")}
    return fs.AzureFileSystem(ACCOUNT, account_key=KEY, blob_storage_scheme=scheme, dfs_storage_scheme=scheme, **places)


def write(filesystem: fs.FileSystem) -> None:
    """One object, which all read."""
    with filesystem.open_output_stream("models/m/a") as stream:
        stream.write(CONTENT)


def uri_of(store: str) -> str:
    """The folder of the object."""
    return os.environ["WEB_URL"] if store.startswith("web") else f"{'gs' if store == 'google' else 'az'}://models/m"


def ours(store: str, _: argparse.Namespace) -> Read:
    """This project; it fills memory that is there."""
    storage = open_storage(uri_of(store), Settings.resolve(hedge_percent=0))
    return _by_storage(storage)


def arrow(store: str, _: argparse.Namespace) -> Read:
    """Pyarrow's filesystem, as this project reads through it; it fills memory that is there."""
    if store.startswith("web"):
        raise NotImplementedError("has no client of web servers")
    made = (
        google_filesystem(os.environ["STORAGE_EMULATOR_HOST"])
        if store == "google"
        else azure_filesystem(os.environ["AZURITE_URL"])
    )
    return _by_storage(ArrowStorage(uri_of(store), made, "models/m"))


def _by_storage(storage: Any) -> Read:
    etag = storage.size_and_etag("a").etag

    def read(start: int, stop: int, slot: memoryview) -> memoryview:
        storage.read_into("a", Extent(start, stop), slot, etag=etag)
        return slot

    return read


def by_obstore(store: str, _: argparse.Namespace) -> Read:
    """Obstore `get_range`; it brings its own memory."""
    import obstore
    from obstore.store import AzureStore, GCSStore, HTTPStore

    options: dict[str, Any] = {"allow_http": True}
    if store.endswith("tls"):
        options["root_certificate"] = Path(os.environ["SSL_CERT_FILE"]).read_text()
    if store == "google":
        made: Any = GCSStore(
            "models",
            skip_signature=True,
            config={"base_url": os.environ["STORAGE_EMULATOR_HOST"]},
            client_options=options,
        )
    elif store.startswith("azure"):
        endpoint = f"{os.environ['AZURITE_URL']}/{ACCOUNT}"
        made = AzureStore("models", account_name=ACCOUNT, account_key=KEY, endpoint=endpoint, client_options=options)
    else:
        made = HTTPStore(os.environ["WEB_URL"], client_options=options)
    key = "a" if store.startswith("web") else "m/a"
    return lambda start, stop, slot: memoryview(obstore.get_range(made, key, start=start, end=stop))


def by_fsspec(store: str, _: argparse.Namespace) -> Read:
    """Gcsfs, adlfs, or fsspec's HTTP: `cat_file` of a range; it brings its own memory."""
    if store == "google":
        # Else it asks over gRPC for the kind of the bucket, which the emulator does not know.
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        from gcsfs import GCSFileSystem

        made: Any = GCSFileSystem(token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"])
    elif store.startswith("azure"):
        from adlfs import AzureBlobFileSystem

        made = AzureBlobFileSystem(connection_string=os.environ["AZURE_STORAGE_CONNECTION_STRING"])
    else:
        from fsspec.implementations.http import HTTPFileSystem

        made = HTTPFileSystem()
    path = f"{os.environ['WEB_URL']}/a" if store.startswith("web") else "models/m/a"
    return lambda start, stop, slot: memoryview(made.cat_file(path, start=start, end=stop))


class Runai:
    """Run:ai's streamer, with as many requests of the same size; it reads all of it in one call, into its own memory."""

    def __init__(self, store: str, options: argparse.Namespace) -> None:
        if store.startswith("web"):
            raise NotImplementedError("has no client of web servers")
        os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(options.streams)
        os.environ["RUNAI_STREAMER_CHUNK_BYTESIZE"] = str(options.block_mib * MIB)
        from runai_model_streamer import FileStreamer
        from runai_model_streamer.file_streamer.requests_iterator import FileChunks

        block = options.block_mib * MIB
        self.streamer, self.starts = FileStreamer, list(range(0, len(CONTENT), block))
        sizes = [min(block, len(CONTENT) - start) for start in self.starts]
        self.chunks = FileChunks(0, f"{uri_of(store)}/a", self.starts, sizes)
        self.memory_bytes = options.streams * block

    def read_all(self, seen: Callable[[int, memoryview], None]) -> None:
        """Read it once."""
        with self.streamer() as streamer:
            streamer.stream_files([self.chunks], None, "cpu", self.memory_bytes)
            for _, number, tensor in streamer.get_chunks():
                seen(self.starts[number], memoryview(tensor.numpy()).cast("B"))


READERS: dict[str, Callable[[str, argparse.Namespace], Any]] = {
    "ray_streamer": ours,
    "pyarrow": arrow,
    "obstore": by_obstore,
    "fsspec (gcsfs, adlfs, http)": by_fsspec,
    "Run:ai streamer": Runai,
}
STORES = {"google": google, "azure": azure, "azure tls": azure_tls, "web": web, "web tls": web_tls}


def serve(pipe: Connection, store: str, reader: str, options: argparse.Namespace) -> None:
    """One reader: reads everything whenever it is told to, and tells its CPU seconds and those that passed."""
    try:
        made = READERS[reader](store, options)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:150])
        return
    pipe.send("ready")
    while (order := pipe.recv()) != "end":
        wrong: list[int] = []

        def seen(start: int, data: memoryview, wrong: list[int] = wrong, checks: bool = order == "compare") -> None:
            if checks and data != memoryview(CONTENT)[start : start + len(data)]:
                wrong.append(start)

        began, before = time.perf_counter(), cpu_seconds()
        try:
            for _ in range(options.passes):
                made.read_all(seen) if isinstance(made, Runai) else read_all(made, seen, options)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:150])
            return
        pipe.send((cpu_seconds() - before, time.perf_counter() - began, wrong))


def read_all(read: Read, seen: Callable[[int, memoryview], None], options: argparse.Namespace) -> None:
    """Read it once, in threads, each with memory that is there already."""
    block = options.block_mib * MIB
    starts = range(0, len(CONTENT), block)
    while len(SLOTS) < options.streams:
        SLOTS.append(bytearray(b"\1" * block))

    def stream(number: int) -> None:
        slot = memoryview(SLOTS[number])
        for start in starts[number :: options.streams]:
            stop = min(start + block, len(CONTENT))
            seen(start, read(start, stop, slot[: stop - start]))

    with ThreadPoolExecutor(options.streams) as pool:
        list(pool.map(stream, range(options.streams)))


SLOTS: list[bytearray] = []


def cpu_seconds() -> float:
    """Of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(store: str, options: argparse.Namespace) -> dict[str, str]:
    """CPU seconds of each reader for 10^9 bytes, and GB/s; or why it read nothing."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    figures: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, str] = {}
    for reader in READERS:
        pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, store, reader, options), daemon=True).start()
        said = pipe.recv()
        if said == "ready":
            pipes[reader], figures[reader] = pipe, []
        else:
            found[reader] = said
    gigabytes = len(CONTENT) * options.passes / 1e9
    for turn in range(1 + options.rounds):
        for reader, pipe in list(pipes.items()):
            pipe.send("read" if turn else "compare")
            said = pipe.recv()
            if isinstance(said, str):
                found[reader] = said
                del pipes[reader]
                continue
            cpu, wall, wrong = said
            assert not wrong, f"{reader} brought other bytes from {store}"
            if turn:
                figures[reader].append((cpu / gigabytes, gigabytes / wall))
    for reader, pipe in pipes.items():
        pipe.send("end")
        cpu, rate = (statistics.median(values) for values in zip(*figures[reader], strict=True))
        found[reader] = f"{cpu:.2f} / {rate:.2f}"
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=8, help="how often all of it is read in one round")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--block-mib", type=int, default=8)
    parser.add_argument("--store", choices=STORES, action="append")
    options = parser.parse_args()
    print("CPU seconds for 10^9 bytes / GB/s")
    for store in options.store or STORES:
        if store.startswith("azure") and not azurite_program():
            continue
        with STORES[store]() as variables, _environment(variables):
            found = measure(store, options)
        for reader in READERS:
            print(f"{store:8} {reader:28} {found[reader]}", flush=True)


if __name__ == "__main__":
    main()
