"""How cheaply do bytes get from a socket into memory? Ways to receive HTTP bodies from one local server, in one run.

    python benchmarks/body_path.py --rounds 5
    python benchmarks/body_path.py --rounds 7 --streams 16 32 --processes 2

The server is a process that answers every request with the same 8 MiB out of its memory, plain and over TLS, so that what
differs is the client alone. Each way has warm connections and prepared buffers of its own. Prints medians of processor
seconds of the client for each 10^9 bytes, and the rate, which the server's share of the machine limits.

With `--processes` the streams of this project are also shared out over so many processes, each with an interpreter of its own, that
receive into shared memory; once as that, and once with the copy out of it that tensors of another process then need.
"""

from __future__ import annotations

import argparse
import http.client
import mmap
import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.settings import Settings
from ray_streamer.storage.counters import Counters
from ray_streamer.storage.http_client import HttpClient
from ray_streamer.testing.certificates import make_certificates

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

BODY_BYTES = 8 << 20
Read = Callable[[memoryview], None]
"""Receives one body."""
Way = Callable[[int, Path | None], Read]
"""Makes the reader of one thread, for a port and, over TLS, a CA file."""


def http_client(port: int, ca_file: Path | None) -> Read:
    """http.client: its buffered reader passes pieces through three layers of Python."""
    if ca_file is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=_context(ca_file))

    def read(buffer: memoryview) -> None:
        connection.request("GET", "/")
        with connection.getresponse() as response:
            landed = 0
            while landed < BODY_BYTES:
                landed += response.readinto(buffer[landed : landed + (256 << 10)])

    return read


def bare_socket(port: int, ca_file: Path | None) -> Read:
    """`recv_into` and nothing else: what the socket itself costs; not a client."""
    connected = socket.create_connection(("127.0.0.1", port), timeout=30)
    if ca_file is not None:
        connected = _context(ca_file).wrap_socket(connected, server_hostname="127.0.0.1")

    def read(buffer: memoryview) -> None:
        connected.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        _, _, begun = _until_empty_line(connected.recv)
        buffer[: len(begun)] = begun
        landed = len(begun)
        while landed < BODY_BYTES:
            landed += connected.recv_into(buffer[landed:])

    return read


def memory_bio(port: int, ca_file: Path | None) -> Read:
    """TLS out of memory: ciphertext is received 256 KiB at once, which saves system calls and costs a copy."""
    if ca_file is None:
        return bare_socket(port, None)
    connected = socket.create_connection(("127.0.0.1", port), timeout=30)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _context(ca_file).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    ciphertext = memoryview(bytearray(256 << 10))

    def until_done(step: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                return step(*arguments)
            except ssl.SSLWantReadError:
                connected.sendall(outgoing.read())
                incoming.write(ciphertext[: connected.recv_into(ciphertext)])

    until_done(tls.do_handshake)

    def read(buffer: memoryview) -> None:
        tls.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        connected.sendall(outgoing.read())
        _, _, begun = _until_empty_line(lambda num_bytes: until_done(tls.read, num_bytes))
        buffer[: len(begun)] = begun
        landed = len(begun)
        while landed < BODY_BYTES:
            landed += until_done(tls.read, BODY_BYTES - landed, buffer[landed:])

    return read


def this_project(port: int, ca_file: Path | None) -> Read:
    """The client of the object stores: heads as `http_head` reads them, `recv_into` for bodies, clocks included."""
    client = HttpClient(Settings(hedge_percent=0), ca_file=str(ca_file or ""), counters=Counters())
    url = f"{'https' if ca_file else 'http'}://127.0.0.1:{port}/"

    def read(buffer: memoryview) -> None:
        with client.get(url, {}) as answer:
            client.receive_into(answer, buffer)
            if answer.num_received != BODY_BYTES:
                raise SystemExit("a body ended early")

    return read


WAYS: dict[str, Way] = {
    "this project": this_project,
    "http.client": http_client,
    "bare socket": bare_socket,
    "ssl.MemoryBIO": memory_bio,
}


def measure(make: Way, port: int, ca_file: Path | None, *, num_streams: int, bodies: int) -> tuple[float, float]:
    """Processor seconds for each 10^9 bytes, and 10^9 bytes for each second."""
    readers = [make(port, ca_file) for _ in range(num_streams)]
    buffers = [memoryview(bytearray(os.urandom(4096) * (BODY_BYTES // 4096))) for _ in readers]
    for read, buffer in zip(readers, buffers, strict=True):
        read(buffer)

    cpu_started, started = time.process_time(), time.perf_counter()
    _receive_all(readers, buffers, bodies // num_streams)
    gigabytes = bodies // num_streams * num_streams * BODY_BYTES / 1e9
    return (time.process_time() - cpu_started) / gigabytes, gigabytes / (time.perf_counter() - started)


def measure_processes(
    make: Way, port: int, ca_file: Path | None, *, num_streams: int, bodies: int, num_processes: int, copies: bool
) -> tuple[float, float]:
    """The same, with the streams shared out over processes that receive into memory which this process maps as well."""
    context = multiprocessing.get_context("fork")
    share = num_streams // num_processes
    memories = [mmap.mmap(-1, share * BODY_BYTES) for _ in range(num_processes)]
    pipes: list[Connection] = []
    for memory in memories:
        ours, theirs = multiprocessing.Pipe()
        pipes.append(ours)
        arguments = (theirs, make, port, ca_file, memoryview(memory), bodies // num_streams)
        context.Process(target=receive_in_child, args=arguments, daemon=True).start()
    for pipe in pipes:
        pipe.recv()
    cpu_started, started = time.process_time(), time.perf_counter()
    target = bytearray(BODY_BYTES)
    for pipe in pipes:
        pipe.send("go")
    if copies:
        for number in range(bodies // num_streams * num_streams):
            at = number % share * BODY_BYTES
            target[:] = memoryview(memories[number % num_processes])[at : at + BODY_BYTES]
    cpu_seconds = sum(pipe.recv() for pipe in pipes) + time.process_time() - cpu_started
    gigabytes = bodies // num_streams * num_streams * BODY_BYTES / 1e9
    return cpu_seconds / gigabytes, gigabytes / (time.perf_counter() - started)


def receive_in_child(
    pipe: Connection, make: Way, port: int, ca_file: Path | None, memory: memoryview, bodies: int
) -> None:
    """A process of `measure_processes`: a stream for each part of the memory; says what CPU it took."""
    parts = [memory[at : at + BODY_BYTES] for at in range(0, len(memory), BODY_BYTES)]
    readers = [make(port, ca_file) for _ in parts]
    for read, part in zip(readers, parts, strict=True):
        read(part)
    pipe.send("ready")
    pipe.recv()
    started = time.process_time()
    _receive_all(readers, parts, bodies)
    pipe.send(time.process_time() - started)


def _receive_all(readers: list[Read], buffers: list[memoryview], bodies: int) -> None:
    """So many bodies by each reader, at one time."""

    def work(read: Read, buffer: memoryview) -> None:
        for _ in range(bodies):
            read(buffer)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(readers, buffers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve(pipe: Connection, certificate: Path | None) -> None:
    """The server's process: tells its port, then answers until it is killed."""
    body = memoryview(os.urandom(BODY_BYTES))
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {BODY_BYTES}\r\n\r\n".encode()
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    def answer(connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connected = context.wrap_socket(connected, server_side=True)
        while _until_empty_line(connected.recv)[0]:
            connected.sendall(head)
            connected.sendall(body)

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        pipe.send(listener.getsockname()[1])
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def _until_empty_line(receive: Callable[[int], bytes]) -> tuple[bytes, bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received and (data := receive(4096)):
        received += data
    return received.partition(b"\r\n\r\n")


def _context(ca_file: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def run(options: argparse.Namespace, *, tls: bool) -> None:
    certificates = make_certificates(options.folder) if tls else None
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, certificates.server_file if certificates else None)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    server.start()
    port, ca_file = ours.recv(), certificates.ca_file if certificates else None
    ways = _ways(options, tls=tls)
    for num_streams in options.streams:
        amounts = {"num_streams": num_streams, "bodies": options.bodies}
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                results[name].append(way(port, ca_file, **amounts))
        print_results(results, f"{'TLS' if tls else 'plain':6}{num_streams:3} streams")
    server.kill()
    server.join()


def _ways(options: argparse.Namespace, *, tls: bool) -> dict[str, Callable[..., tuple[float, float]]]:
    ways: dict[str, Callable[..., tuple[float, float]]] = {
        name: partial(measure, make) for name, make in WAYS.items() if tls or make is not memory_bio
    }
    if options.processes:
        for name, copies in (("", False), (", copied", True)):
            measured = partial(measure_processes, this_project, num_processes=options.processes, copies=copies)
            ways[f"{options.processes} processes{name}"] = measured
    return ways


def print_results(results: dict[str, list[tuple[float, float]]], what: str) -> None:
    """Medians, and the median over rounds of each way's CPU to that of this project."""
    base = results["this project"]
    for name, measured in results.items():
        cpu, rate = (statistics.median(column) for column in zip(*measured, strict=True))
        ratio = statistics.median(each[0] / ours[0] for each, ours in zip(measured, base, strict=True))
        print(f"{what}  {name:20}{cpu:7.2f} s/GB  {ratio:5.2f}x{rate:7.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is printed")
    parser.add_argument("--bodies", type=int, default=64, help="of 8 MiB, in each round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--processes", type=int, default=0, help="share this project's streams out over so many, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for tls in (False, True):
            run(options, tls=tls)


if __name__ == "__main__":
    main()
