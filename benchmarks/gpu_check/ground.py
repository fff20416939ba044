"""What is the check run on? A GPU of this machine, or a CUDA runtime without one, which proves the script and measures nothing."""

from __future__ import annotations

import os
import platform
import queue
import secrets
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.device.cuda import open_cuda
from ray_streamer.device.cuda_library import find_loaded_library
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.load import RankLoad
from ray_streamer.storage import open_storage
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from ray_streamer.device.base import Copy
    from ray_streamer.device.cuda import CudaDevice
    from ray_streamer.device.cuda_library import CudaLibrary
    from ray_streamer.planning.read_plan import ReadPlan

MIB = 1 << 20
GIB = 1 << 30
CONCURRENCY = 16
NUM_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """The settings that local files need; the real ones need pydantic, which a GPU machine may not have."""

    direct_io: str = "auto"
    page_cache: str = "auto"
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class Ground:
    """The device that is checked.

    Attributes:
        is_fake: Whether no GPU is used, and no figure means anything.
        megabytes: Size of what is copied and loaded, roughly.
    """

    is_fake: bool
    megabytes: int
    torch_device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "torch_device", torch.device("cpu" if self.is_fake else "cuda:0"))

    @property
    def num_rounds(self) -> int:
        """How often everything is measured."""
        return 1 if self.is_fake else NUM_ROUNDS

    def open_device(self, **options: Any) -> CudaDevice:
        """The device, as a load opens it."""
        return open_fake_cuda(FakeCuda(), **options) if self.is_fake else open_cuda("cuda:0", **options)

    def library(self) -> CudaLibrary:
        """The runtime's functions."""
        return FakeCuda() if self.is_fake else find_loaded_library()

    def synchronize(self) -> None:
        """Waits for everything on the device."""
        if not self.is_fake:
            torch.cuda.synchronize(self.torch_device)

    def reset_peak(self) -> None:
        """Begins to watch device memory anew."""
        if not self.is_fake:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        """Most device memory that torch has taken since, tensors and all."""
        return 0 if self.is_fake else torch.cuda.max_memory_reserved(self.torch_device)

    def free_bytes(self) -> int:
        """Device memory that nobody uses."""
        return 0 if self.is_fake else torch.cuda.mem_get_info(self.torch_device)[0]

    def describe(self) -> dict[str, Any]:
        """What the figures are of."""
        return {
            "is_measurement": not self.is_fake,
            "device": "none: a runtime without a GPU"
            if self.is_fake
            else torch.cuda.get_device_name(self.torch_device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "processor": processor_name(),
            "cpus": len(os.sched_getaffinity(0)),
            "driver": driver_version(),
        }


def processor_name() -> str:
    """As /proc/cpuinfo has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def driver_version() -> str | None:
    """NVIDIA's, where it says so."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except OSError:
        return None


def median_seconds(run: Callable[[], Any], num_rounds: int) -> float:
    """The median wall time of several runs, after one that does not count."""
    seconds: list[float] = []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def deliver_all(device: CudaDevice, blocks: Sequence[tuple[np.ndarray, list[Copy]]], *, num_threads: int = 4) -> None:
    """Delivers every block from a few threads, as readers do, and waits for the last `done`."""
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(num_threads) as readers:
        for source, copies in blocks:
            readers.submit(device.deliver, source, copies, outcomes.put)
    for _ in blocks:
        error = outcomes.get()
        if error is not None:
            raise error


def load(
    ground: Ground,
    plan: ReadPlan,
    *,
    rank: int = 0,
    session: str | None = None,
    memory_limit: int = 256 * MIB,
    device: Any = None,
    wrap_storage: Callable[[Any], Any] = lambda storage: storage,
    device_options: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """One rank's tensors, through everything but the settings and Ray."""
    storage = wrap_storage(open_storage(plan.index.uri, LocalSettings()))  # type: ignore[arg-type]
    mine = plan.rank_plan(rank)
    place = Place(
        session=session or secrets.token_hex(8),
        rank=mine.rank,
        ranks=mine.ranks,
        node="this machine",
        timeouts=Timeouts(startup_seconds=120, neighbour_seconds=60, progress_seconds=300),
    )
    device = device or ground.open_device(**(device_options or {}))
    limit = max(memory_limit, plan.limits.block_bytes)
    try:
        with NodeSession.meet(place) as met:
            return RankLoad(mine, storage, device, met, concurrency=CONCURRENCY, memory_limit=limit).run()
    finally:
        storage.close()
