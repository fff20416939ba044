"""How cheaply do bytes get from a socket into memory? Ways to receive HTTP bodies from one local server, in one run.

    python benchmarks/body_path.py --rounds 5

The server is a process that answers every request with the same 8 MiB out of its memory, plain and over TLS, so that what
differs is the client alone. Each way has warm connections and prepared buffers of its own. Prints medians of processor
seconds of this process for each 10^9 bytes, and the rate, which the server's share of the machine limits.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
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
    """The client of the S3 backend: h11 for heads, `recv_into` for bodies, clocks included."""
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

    def work(read: Read, buffer: memoryview) -> None:
        for _ in range(bodies // num_streams):
            read(buffer)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(readers, buffers, strict=True)]
    cpu_started, started = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gigabytes = bodies // num_streams * num_streams * BODY_BYTES / 1e9
    return (time.process_time() - cpu_started) / gigabytes, gigabytes / (time.perf_counter() - started)


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
    for num_streams in options.streams:
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name, make in WAYS.items():
                if tls or make is not memory_bio:
                    results[name].append(measure(make, port, ca_file, num_streams=num_streams, bodies=options.bodies))
        for name, measured in results.items():
            if measured:
                cpu, rate = (statistics.median(column) for column in zip(*measured, strict=True))
                print(f"{'TLS' if tls else 'plain':6}{num_streams:3} streams  {name:14}{cpu:7.2f} s/GB{rate:7.2f} GB/s")
    server.kill()
    server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is printed")
    parser.add_argument("--bodies", type=int, default=64, help="of 8 MiB, in each round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for tls in (False, True):
            run(options, tls=tls)


if __name__ == "__main__":
    main()
