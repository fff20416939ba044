"""How many streams does S3 need? One rank behind a proxy that gives each request S3's published shape.

    python benchmarks/s3_shape.py --rounds 3

Amazon's guide names 100 to 200 ms to the first byte and 85 to 90 MB/s for each request. So a stream that asks for one block after
the other brings block / (first byte + block / rate), and n of them n times that, up to what the machine can carry: client, proxy
and server share it here. What it can carry is measured in the same round, through the same proxy, with the same number of
streams and no shape. So is what as many bare readers get: threads that do nothing but ask and receive, by http.client, into memory that
is not used. Prints medians. Source: Amazon S3 User Guide, "Performance guidelines for Amazon S3".
"""

from __future__ import annotations

import argparse
import http.client
import os
import statistics
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from fault_process import FaultProcess
from side_by_side.checkpoint import make_checkpoint

import ray_streamer
from ray_streamer.testing.faults import Fault
from ray_streamer.testing.s3_server import start_s3_server

MIB = 1 << 20
NUM_PLANNED = 10_000


def rate(uri: str, proxy: FaultProcess, fault: Fault, *, num_streams: int, block_mib: int) -> float:
    """10^6 bytes for each second of one load, without its planning."""
    settings = ray_streamer.Settings(
        s3_endpoint_url=proxy.url,
        concurrency=num_streams,
        block_bytes=block_mib * MIB,
        memory_limit=num_streams * block_mib * MIB,
    )
    proxy.plan_faults([fault] * NUM_PLANNED)
    told: list[tuple[int, float]] = []
    ray_streamer.load_rank(
        uri,
        rank=0,
        world_size=1,
        settings=settings,
        on_statistics=lambda rank: told.append((rank.bytes_read, rank.seconds["stream"])),
    )
    ((num_bytes, seconds),) = told
    return num_bytes / seconds / 1e6


def bare_rate(url: str, *, num_streams: int, num_blocks: int, block_bytes: int) -> float:
    """10^6 bytes for each second of threads that read blocks of one object, and nothing else."""
    parts = urlsplit(url)

    def read_blocks() -> None:
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        buffer = memoryview(bytearray(os.urandom(4096) * (block_bytes // 4096)))
        for number in range(num_blocks):
            headers = {"Range": f"bytes={number * block_bytes}-{(number + 1) * block_bytes - 1}"}
            connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
            with connection.getresponse() as response:
                landed = 0
                while landed < block_bytes:
                    landed += response.readinto(buffer[landed:])
        connection.close()

    threads = [threading.Thread(target=read_blocks) for _ in range(num_streams)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_streams * num_blocks * block_bytes / (time.perf_counter() - began) / 1e6


def signed_url(proxy_url: str, key: str) -> str:
    """For the bare readers."""
    import boto3

    client = boto3.client("s3", endpoint_url=proxy_url)
    return str(client.generate_presigned_url("get_object", Params={"Bucket": "shape", "Key": key}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--block-mib", type=int, nargs="+", default=[8])
    parser.add_argument("--first-byte-seconds", type=float, default=0.1)
    parser.add_argument("--megabytes-per-second", type=float, default=87.0)
    parser.add_argument("--layers", type=int, default=10, help="about 98 MB each, and 262 MB of embeddings")
    parser.add_argument("--folder", type=Path, default=Path(".demo/shape"))
    options = parser.parse_args()
    shape = Fault(delay_seconds=options.first_byte_seconds, bytes_per_second=options.megabytes_per_second * 1e6)
    make_checkpoint(options.folder, layers=options.layers)
    with start_s3_server() as server, FaultProcess(server.endpoint_url) as proxy:
        os.environ.update(server.environment())
        uri = server.upload_folder(options.folder, "shape", "model")
        url = signed_url(proxy.url, "model/" + max(options.folder.glob("*.safetensors")).name)
        print(
            "block  streams   sum of streams   machine carries   bare readers   ours   of the smaller   of bare readers"
        )
        for block_mib in options.block_mib:
            block_bytes = block_mib * MIB
            stream = block_bytes / (options.first_byte_seconds + block_bytes / options.megabytes_per_second / 1e6) / 1e6
            for num_streams in options.streams:
                carried, bare, ours = [], [], []
                for _ in range(options.rounds):
                    carried.append(rate(uri, proxy, Fault(), num_streams=num_streams, block_mib=block_mib))
                    proxy.plan_faults([shape] * NUM_PLANNED)
                    bare.append(bare_rate(url, num_streams=num_streams, num_blocks=12, block_bytes=block_bytes))
                    ours.append(rate(uri, proxy, shape, num_streams=num_streams, block_mib=block_mib))
                smaller = [have / min(num_streams * stream, limit) for have, limit in zip(ours, carried, strict=True)]
                of_bare = [have / limit for have, limit in zip(ours, bare, strict=True)]
                middle = statistics.median
                print(
                    f"{block_mib:3} MiB {num_streams:7} {num_streams * stream:11.0f} MB/s {middle(carried):12.0f} MB/s"
                    f" {middle(bare):9.0f} MB/s {middle(ours):5.0f} MB/s {middle(smaller):9.0%} {middle(of_bare):15.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
