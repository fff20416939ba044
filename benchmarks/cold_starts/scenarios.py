"""What is loaded, from where, into which machines? Published figures, each with its source; change them here to ask for your own place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.planning.limits import ReadLimits
from ray_streamer.testing.layouts import deepseek_v3_layout, llama_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)
GBIT = 1e9 / 8
NUM_NODES = tuple(1 << exponent for exponent in range(11))


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Where the checkpoint is.

    Attributes:
        name: In the page.
        first_byte_seconds: From a request to the first byte of its answer, in the mean.
        first_byte_spread_seconds: How much earlier or later at most.
        stream_rate: Bytes per second of one request.
        total_rate: Bytes per second to all nodes together, with blocks of `LIMITS`.
        source: Of these figures.
    """

    name: str
    first_byte_seconds: float
    first_byte_spread_seconds: float
    stream_rate: float
    total_rate: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node.

    Attributes:
        name: In the page.
        num_gpus: Ranks of a replica, all on this node.
        link_rate: Bytes per second from the storage; to and from other nodes as well, unless these have a network of their own.
        fabric_rate: Bytes per second between nodes over that network.
        gpu_copy_rate: Bytes per second from pinned memory to one GPU.
        broadcast_rate: Bytes per second that each GPU gets when one sends to all of the node.
        source: Of these figures.
    """

    name: str
    num_gpus: int
    link_rate: float
    fabric_rate: float
    gpu_copy_rate: float
    broadcast_rate: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint, known by its headers."""

    name: str
    index: CheckpointIndex


S3 = Storage(
    name="S3, one prefix",
    first_byte_seconds=0.15,
    first_byte_spread_seconds=0.05,
    stream_rate=87e6,
    total_rate=5500 * float(LIMITS.block_bytes),
    source="100 to 200 ms to the first byte, 87 MB/s for each request and 5,500 requests per second for each prefix, so 46 GB/s with blocks of "
    "8 MiB. Amazon S3 User Guide, performance guidelines: latencies of 100 to 200 ms; 85 to 90 MB/s; at least 5,500 GET requests per second. S3 gives "
    "a prefix more after a while of such load; meanwhile it answers 503.",
)

LUSTRE = Storage(
    name="Lustre, 100 GB/s",
    first_byte_seconds=0.001,
    first_byte_spread_seconds=0.0005,
    stream_rate=2.1e9,
    total_rate=100e9,
    source="1 ms, 2.1 GB/s for each stream and 100 GB/s in all. FSx for Lustre User Guide: latencies below a millisecond, up to "
    "1,000 MB/s for each TiB, so this is a file system of about 100 TiB. One stream of 2 GiB/s was reported to the transformers project "
    "by a user of Lustre.",
)

STORAGES = (S3, LUSTRE)

GPU_NODE = Machine(
    name="8 GPUs of 141 GB, 100 Gbit/s",
    num_gpus=8,
    link_rate=100 * GBIT,
    fabric_rate=3200 * GBIT,
    gpu_copy_rate=50e9,
    broadcast_rate=300e9,
    source="100 Gbit/s to the storage, as over one network card of a p5en.48xlarge; 3,200 Gbit/s between nodes over EFA (both: Amazon EC2 "
    "instance types). 50 GB/s from pinned memory to each GPU, and 300 GB/s when one GPU sends to seven: the FlashPack and InstantTensor "
    "projects report 53 and 331 GB/s on nodes with eight H100.",
)

PEER_STREAM_RATE = 5 * GBIT
"""Bytes per second of one connection between two nodes. Amazon EC2 User Guide: a single flow gets 5 Gbit/s outside of a placement group."""

FABRIC_STREAM_RATE = 100 * GBIT
"""The same over EFA: one card's."""

PEER_DELAY_SECONDS = 0.0005


def models() -> list[Model]:
    """The models of the page."""
    layouts = {
        "Llama-3-70B": (llama_layout(8192, 80, 64, 8, 28672, 128256), 30),
        "Llama-3.1-405B": (llama_layout(16384, 126, 128, 8, 53248, 128256), 191),
        "DeepSeek-V3": (deepseek_v3_layout(), 163),
    }
    return [
        Model(name=name, index=header_only_index(layout.tensors, num_files=num_files, config=layout.config))
        for name, (layout, num_files) in layouts.items()
    ]
