"""Which knobs has a load, wherever the checkpoint is? Concurrency, memory, how files are read, and how long is waited for what."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter

MIB = 1 << 20
ENV_PREFIX = "RAY_STREAMER_"

# A week: longer waits are endless to people, and some are too long for the operating system's clocks.
LONGEST_SECONDS = 7 * 24 * 3600
"""The largest value of a setting in seconds."""

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]
"""How long something may take."""


@cache
def _byte_size() -> TypeAdapter[ByteSize]:
    return TypeAdapter(ByteSize)


def _parse_memory_limit(value: Any) -> int:
    """Bytes, with text such as "512MiB" allowed, or -1."""
    return -1 if str(value).strip() == "-1" else int(_byte_size().validate_python(value))


class LoadSettings(BaseModel):
    """The knobs of every load."""

    # Nobody makes this class, or the next one: the validators of the last one are those that count.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    concurrency: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Reads in flight per rank. Unset = 16; from a local disk, 4.",
    )
    memory_limit: Annotated[int, BeforeValidator(_parse_memory_limit)] | None = Field(
        default=None,
        description="Staging bytes per rank: N = at most N; 0 = the least that works; -1 = as much as the plan can use; "
        "unset = the smaller of 1 GiB and a quarter of the node's available memory over its local ranks.",
    )
    node_memory_limit: ByteSize | None = Field(default=None, description="Staging bytes over all ranks of one node.")
    block_bytes: ByteSize = Field(
        default=ByteSize(8 * MIB), ge=4096, multiple_of=4096, description="Largest storage request; a multiple of 4096."
    )
    min_run_bytes: ByteSize | None = Field(
        default=None,
        description="Slices in pieces smaller than this are fetched as one range, including the bytes between. "
        "Unset = 256 KiB on object stores, 64 KiB on filesystems.",
    )
    max_gap_bytes: ByteSize = Field(
        default=ByteSize(64 << 10), description="Largest gap of unneeded bytes that one request reads over."
    )
    direct_io: Literal["auto", "on", "off"] = Field(
        default="auto", description="O_DIRECT on local filesystems: auto = when a file is not in the page cache."
    )
    page_cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="Every rank copies local files from the page cache: auto = when a file is in it."
    )
    device_scratch_bytes: ByteSize = Field(
        default=ByteSize(0),
        description="GPU memory per rank, besides the tensors, for cutting rows shorter than 1 KiB; 0 = such rows are packed on "
        "the host.",
    )
    gpu_direct_storage: Literal["on", "off"] = Field(
        default="off",
        description="GPUDirect Storage (kvikio) for blocks of local files that only one rank needs and that are contiguous in its "
        "tensor.",
    )
    startup_timeout_seconds: Seconds = Field(
        default=300.0, description="Limit for placing, starting and connecting the ranks."
    )
    neighbour_timeout_seconds: Seconds = Field(
        default=8.0,
        description="How long ranks of a node wait for one that shows no activity, and the driver for one that is stopped by a "
        "signal.",
    )
    progress_timeout_seconds: Seconds = Field(
        default=300.0,
        description="How long one step of a rank (headers, plan, block) may take, and how long a rank may not answer the driver. "
        "Does not apply to the caller's function in `model.run`.",
    )
    connect_timeout_seconds: Seconds = Field(default=10.0, description="Limit for opening a connection.")
    first_byte_timeout_seconds: Seconds = Field(
        default=30.0,
        description="Limit for the response headers of an object store.",
    )
    stall_timeout_seconds: Seconds = Field(
        default=30.0,
        description="Limit for each MiB of a response body of an object store.",
    )
    list_timeout_seconds: Seconds = Field(
        default=30.0,
        description="Limit for listing one folder of an object store, all pages and retries together.",
    )
    retry_deadline_seconds: float = Field(
        default=120.0,
        ge=0,
        le=LONGEST_SECONDS,
        allow_inf_nan=False,
        description="How long one read is retried after transient errors.",
    )
    hedge_percent: float = Field(
        default=5.0,
        ge=0,
        le=100,
        description="Hedged requests per 100 requests: sent when the response headers of an object store are late.",
    )
    max_bandwidth: ByteSize | None = Field(
        default=None, gt=0, description="Bytes per second from object stores, over all ranks of one node."
    )
    metrics: bool = Field(
        default=False,
        description="Publish metrics of each rank: at Ray's Prometheus endpoint, or through OpenTelemetry where there is no Ray.",
    )
    strict_index: bool = Field(
        default=False,
        description="Refuse a checkpoint whose index json and files disagree. Otherwise the index decides, with a warning.",
    )
    cache_dir: str = Field(
        default="~/.cache/ray_streamer",
        min_length=1,
        description="Folder on each node that caches config and tokenizer files of remote checkpoints.",
    )
