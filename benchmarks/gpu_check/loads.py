"""Does the copy hide behind the read? A load against its two halves, each alone: reads that nobody copies, copies that nobody reads.

The halves are the same load with one part left out: a device that says "done" at once, or a storage that reads nothing. Also:
how much device memory a load takes beyond its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ground import Ground, load, median_seconds
from plans import llama_plan

if TYPE_CHECKING:
    from pathlib import Path


class NoCopies:
    """A device that copies nothing."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def deliver(self, source: Any, copies: Any, done: Any) -> None:
        """Done before it began."""
        done(None)


class NoReads:
    """A storage whose bytes are whatever is in the buffer."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read_into(self, path: str, extent: Any, buffer: Any, **_: Any) -> None:
        """Leaves the buffer as it is."""


def check(ground: Ground, folder: Path) -> list[dict[str, Any]]:
    """A row for whole tensors and one for the first of four ranks, which takes runs of 2 to 7 KiB out of rows."""
    return [_check(ground, folder, tp) for tp in (1, 4)]


def _check(ground: Ground, folder: Path, tp: int) -> dict[str, Any]:
    plan = llama_plan(folder, tp, is_shared=False)
    device = ground.open_device()
    results: list[Any] = []

    def run(**arguments: Any) -> None:
        results.clear()
        results.append(load(ground, plan, **arguments))
        ground.synchronize()

    read_seconds = median_seconds(lambda: run(device=NoCopies(device)), ground.num_rounds)
    copy_seconds = median_seconds(lambda: run(device=device, wrap_storage=NoReads), ground.num_rounds)
    load_seconds = median_seconds(lambda: run(device=device), ground.num_rounds)
    results.clear()
    ground.reset_peak()
    free_bytes = ground.free_bytes()
    run(device=device)
    num_bytes = sum(tensor.nbytes for tensor in results[0].values())
    return {
        "tp": tp,
        "bytes": num_bytes,
        "read_seconds": read_seconds,
        "copy_seconds": copy_seconds,
        "load_seconds": load_seconds,
        "load_gbps": num_bytes / load_seconds / 1e9,
        "over_the_slower_half": load_seconds / max(read_seconds, copy_seconds),
        "torch_bytes_beyond_tensors": None if ground.is_fake else ground.peak_bytes() - num_bytes,
        "device_bytes_beyond_tensors": None if ground.is_fake else free_bytes - ground.free_bytes() - num_bytes,
    }
