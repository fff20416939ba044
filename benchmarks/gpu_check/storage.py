"""How fast do bytes come over HTTP into this machine's memory, and what does Python's interpreter lock cost there?

A server on this machine, in processes of its own, answers out of memory. Readers are processes, each with one interpreter and its share of the
streams, and receive by the project's HTTP client into memory that they have used before. No account, and no package for any store, is needed.
One reader that brings no more with more streams, where two bring more, is bound by its interpreter; all readers together, by the machine.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ground import MIB

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

BODY_BYTES = 8 * MIB
STREAMS = (1, 2, 4, 8, 16, 32, 64)
READERS = (1, 2, 4, 8)
SERVERS_SHARE = 2
"""One of so many CPUs serves."""
START_SECONDS = 120.0
SETTINGS = SimpleNamespace(
    connect_timeout_seconds=10.0,
    first_byte_timeout_seconds=30.0,
    stall_timeout_seconds=30.0,
    hedge_percent=0.0,
    max_bandwidth=None,
)
"""What the client reads of `Settings`, which needs pydantic."""


def check(
    *, streams: tuple[int, ...] = STREAMS, readers: tuple[int, ...] = READERS, seconds: float
) -> list[dict[str, Any]]:
    """A row for each number of streams and of readers that can share them.

    Args:
        streams: Requests at one time, over all readers.
        readers: Processes that receive.
        seconds: Of each row.
    """
    if importlib.util.find_spec("h11") is None:
        return [{"not measured": "needs h11: pip install h11"}]
    with ExitStack() as owned:
        port = _serve(owned, max(1, (os.cpu_count() or 1) // SERVERS_SHARE))
        return [
            _row(port, num_streams, num_readers, seconds)
            for num_readers, num_streams in itertools.product(readers, streams)
            if num_streams % num_readers == 0
        ]


def _row(port: int, num_streams: int, num_readers: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as owned:
        arguments = (port, num_streams // num_readers, seconds)
        pipes = [_started(owned, _read, *arguments) for _ in range(num_readers)]
        for pipe in pipes:
            _told(pipe)
        for pipe in pipes:
            pipe.send("go")
        told = [_told(pipe) for pipe in pipes]
    gigabytes = sum(num_bytes for num_bytes, _, _ in told) / 1e9
    longest = max(elapsed for _, elapsed, _ in told)
    cpu_seconds = sum(cpu for _, _, cpu in told)
    return {
        "readers": num_readers,
        "streams": num_streams,
        "GB/s": gigabytes / longest,
        "CPU s/GB": cpu_seconds / gigabytes,
        "CPUs per reader": cpu_seconds / longest / num_readers,
    }


def _serve(owned: ExitStack, num_servers: int) -> int:
    """The port at which so many processes answer, until `owned` ends."""
    listener = owned.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
    for _ in range(num_servers):
        _told(_started(owned, _answer_all, listener))
    return listener.getsockname()[1]


def _started(owned: ExitStack, work: Any, *arguments: Any) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    owned.callback(_end, process)
    return ours


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _told(pipe: Connection) -> Any:
    if not pipe.poll(START_SECONDS):
        raise TimeoutError(f"a process of the storage check says nothing for {START_SECONDS:g} s")
    return pipe.recv()


def _read(pipe: Connection, port: int, num_streams: int, seconds: float) -> None:
    """One reader: bytes received, seconds, and its CPU seconds; a process of its own."""
    from ray_streamer.storage.counters import Counters
    from ray_streamer.storage.http_client import HttpClient

    client = HttpClient(SETTINGS, ca_file="", counters=Counters())
    buffers = [memoryview(bytearray(os.urandom(4096) * (BODY_BYTES // 4096))) for _ in range(num_streams)]
    received = [0] * num_streams

    def receive(stream: int) -> None:
        with client.get(f"http://127.0.0.1:{port}/", {}) as answer:
            client.receive_into(answer, buffers[stream])
            received[stream] += answer.num_received

    def receive_until(stream: int, end: float) -> None:
        # One body at least, however late the thread starts.
        receive(stream)
        while time.perf_counter() < end:
            receive(stream)

    def receive_for(duration: float) -> None:
        end = time.perf_counter() + duration
        threads = [threading.Thread(target=receive_until, args=(stream, end)) for stream in range(num_streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # Connections are made, and memory is touched, before anything is measured.
    receive_for(1e-3)
    received = [0] * num_streams
    pipe.send("ready")
    pipe.recv()
    started, cpu_started = time.perf_counter(), time.process_time()
    receive_for(seconds)
    pipe.send((sum(received), time.perf_counter() - started, time.process_time() - cpu_started))


def _answer_all(pipe: Connection, listener: socket.socket) -> None:
    """One of the servers; a process of its own."""
    body = memoryview(os.urandom(BODY_BYTES))
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {BODY_BYTES}\r\n\r\n".encode()

    def answer(connected: socket.socket) -> None:
        asked = b""
        with connected, suppress(ConnectionError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connected.recv(4096):
                asked += data
                if asked.endswith(b"\r\n\r\n"):
                    asked = b""
                    connected.sendall(head)
                    connected.sendall(body)

    pipe.send("ready")
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
