"""Which loads does the demo make, and when has it failed?

    disk, cold    the files' pages were dropped before
    disk, warm    the files are in the page cache
    S3            RADOS Gateway, else moto with a smaller checkpoint, since that serves about 40 MB/s

Ray is a local one, on loopback alone; it, the S3 server and every rank end with the demo.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray_streamer.demo.checkpoint import demo_layout, drop_page_cache, make_checkpoint
from ray_streamer.demo.proof import Proof, prove
from ray_streamer.errors import RayStreamerError
from ray_streamer.settings import Settings
from ray_streamer.testing.s3_server import S3ServerUnavailableError, start_s3_server
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.testing.s3_server import S3Server

MOTO_BYTES = 100_000_000

# The first is read when Ray is imported; Ray then listens on 127.0.0.1 alone.
_RAY_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoLoad:
    """One load, and the proof of every rank.

    Attributes:
        storage: Where the bytes came from.
        must_read: Whether every byte had to come from storage, once, rather than from the page cache.
        report: What the load did.
        proofs: One for each rank.
    """

    storage: str
    must_read: bool
    report: LoadReport
    proofs: tuple[Proof, ...]

    @property
    def failures(self) -> list[str]:
        """What is not as promised, one sentence each."""
        failures = [
            f"{self.storage}: rank {proof.rank} holds wrong bytes: {', '.join(proof.faults[:5])}"
            for proof in self.proofs
            if proof.faults or not proof.num_tensors
        ]
        if self.must_read and round(self.report.amplification, 2) != 1.0:
            failures.append(f"{self.storage}: amplification is {self.report.amplification:.2f}, not 1.00")
        failures += [
            f"{self.storage}: rank {rank.rank} staged {rank.peak_staging_bytes} bytes of {rank.memory_limit} allowed"
            for rank in self.report.ranks
            if rank.peak_staging_bytes > rank.memory_limit
        ]
        return failures

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        proofs = [proof.as_dict() for proof in self.proofs]
        return {"storage": self.storage, "report": self.report.as_dict(), "proofs": proofs}


@dataclass(frozen=True, slots=True)
class Demo:
    """All loads of a demo."""

    loads: tuple[DemoLoad, ...]

    @property
    def failures(self) -> list[str]:
        """What is not as promised; empty when the demo succeeded."""
        return [failure for load in self.loads for failure in load.failures]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"loads": [load.as_dict() for load in self.loads], "failures": self.failures}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What may be chosen.

    Attributes:
        folder: Holds the checkpoints; made when missing, kept afterwards.
        num_bytes: About the size of the checkpoint.
        tp: Ranks.
        memory_limit: Staging bytes of each rank.
        s3: Which S3 server.
    """

    folder: Path
    num_bytes: int
    tp: int
    memory_limit: int
    s3: Literal["auto", "rgw", "moto"] = "auto"


def run_demo(options: DemoOptions, announce: Callable[[str], None]) -> Demo:
    """Makes the checkpoint, loads it three times and proves each load; `announce` is told what happens.

    Raises:
        RayStreamerError: A load failed, or there is no S3 server to be had here.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray_streamer.cluster.connection import connect

    checkpoint = _prepare(options.folder, options.num_bytes, announce)
    announce("starting a local Ray")
    connection = connect("local", num_local_cpus=max(options.tp, os.cpu_count() or 1))
    try:
        return Demo((*_load_from_disk(checkpoint, options, announce), _load_from_s3(checkpoint, options, announce)))
    finally:
        connection.close()


def _prepare(folder: Path, num_bytes: int, announce: Callable[[str], None]) -> Path:
    layout = demo_layout(num_bytes)
    checkpoint = folder.resolve() / f"llama-{layout.total_bytes // 1_000_000}-mb"
    is_new = make_checkpoint(checkpoint, layout)
    num_layers = layout.config["num_hidden_layers"]
    announce(
        f"{'made' if is_new else 'found'} {checkpoint}: Llama, {num_layers} layers, {len(layout.tensors)} tensors, "
        f"{human_bytes(layout.total_bytes)}"
    )
    return checkpoint


def _load_from_disk(checkpoint: Path, options: DemoOptions, announce: Callable[[str], None]) -> list[DemoLoad]:
    drop_page_cache(checkpoint)
    # Where pages cannot be dropped, as on tmpfs, they are not to be used all the same.
    cold = _load(str(checkpoint), "disk, cold", checkpoint, options, announce, page_cache="off")
    # Proving the first load has read every page again.
    return [cold, _load(str(checkpoint), "disk, warm", checkpoint, options, announce, must_read=False)]


def _load_from_s3(checkpoint: Path, options: DemoOptions, announce: Callable[[str], None]) -> DemoLoad:
    try:
        server = start_s3_server(options.s3)
    except S3ServerUnavailableError as error:
        raise RayStreamerError(str(error)) from error
    with server:
        if server.kind == "moto" and options.num_bytes > MOTO_BYTES:
            announce("RADOS Gateway is not installed: moto serves a smaller checkpoint (about 40 MB/s)")
            checkpoint = _prepare(options.folder, MOTO_BYTES, announce)
        announce(f"uploading to S3 ({_SERVERS[server.kind]})")
        uri = server.upload_folder(checkpoint, "demo", checkpoint.name)
        storage = f"S3 ({_SERVERS[server.kind]})"
        return _load(uri, storage, checkpoint, options, announce, store=_store_settings(server))


_SERVERS = {"rgw": "RADOS Gateway", "moto": "moto"}


def _store_settings(server: S3Server) -> dict[str, Any]:
    """What leads this process and the ranks to the server, whatever the environment says of other stores."""
    return {
        "s3_endpoint_url": server.endpoint_url,
        "s3_region": server.region,
        "s3_addressing": "path",
        "s3_unsigned": False,
        "s3_access_key_id": server.access_key,
        "s3_secret_access_key": server.secret_key,
    }


def _load(
    uri: str,
    storage: str,
    checkpoint: Path,
    options: DemoOptions,
    announce: Callable[[str], None],
    *,
    must_read: bool = True,
    page_cache: Literal["auto", "off"] = "auto",
    store: Mapping[str, Any] | None = None,
) -> DemoLoad:
    from ray_streamer.api.sharded import load_sharded

    announce(f"loading {uri} from {storage} into {options.tp} ranks")
    settings = Settings.resolve(memory_limit=options.memory_limit, page_cache=page_cache, **(store or {}))
    with load_sharded(uri, options.tp, settings=settings) as model:
        announce("comparing every tensor of every rank with safetensors")
        proofs = model.run(prove, str(checkpoint))
        return DemoLoad(storage=storage, must_read=must_read, report=model.stats(), proofs=tuple(proofs))
