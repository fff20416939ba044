"""How many streams does S3 need? One rank behind a proxy that gives each request S3's published shape.

    python benchmarks/s3_shape.py --rounds 3

Amazon's guide names 100 to 200 ms to the first byte and 85 to 90 MB/s for each request. So a stream that asks for one block after
the other brings block / (first byte + block / rate), and n of them n times that, up to what the machine can carry: client, proxy
and server share it here. What it can carry is measured in the same round, through the same proxy, with the same number of
streams and no shape. Prints medians. Source: Amazon S3 User Guide, "Performance guidelines for Amazon S3".
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from compare import make_checkpoint

import ray_streamer
from ray_streamer.testing.fault_process import FaultProcess
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
        print("block  streams   sum of streams   machine carries   reached   of the smaller", flush=True)
        for block_mib in options.block_mib:
            block_bytes = block_mib * MIB
            stream = block_bytes / (options.first_byte_seconds + block_bytes / options.megabytes_per_second / 1e6) / 1e6
            for num_streams in options.streams:
                carried, reached = [], []
                for _ in range(options.rounds):
                    carried.append(rate(uri, proxy, Fault(), num_streams=num_streams, block_mib=block_mib))
                    reached.append(rate(uri, proxy, shape, num_streams=num_streams, block_mib=block_mib))
                shares = [have / min(num_streams * stream, limit) for have, limit in zip(reached, carried, strict=True)]
                print(
                    f"{block_mib:3} MiB {num_streams:7} {num_streams * stream:11.0f} MB/s"
                    f" {statistics.median(carried):12.0f} MB/s {statistics.median(reached):4.0f} MB/s"
                    f" {statistics.median(shares):15.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
