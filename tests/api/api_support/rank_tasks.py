"""What rank processes do on order; every function runs in a process of its own and gives back small values."""

from __future__ import annotations

import ctypes
import gc
import os
from collections import Counter
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

import ray_streamer
from api_support import oracle
from ray_streamer.errors import DeviceError
from ray_streamer.testing.possessions import descriptors, mappings_of, package_threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_streamer.rank.statistics import RankStatistics


def load(uri: str, folder: str, *, tp_index: int, **arguments: Any) -> list[str]:
    """Load and compare; gives the names of wrong tensors."""
    tensors = ray_streamer.load_rank(uri, **arguments)
    return oracle.faults(tensors, folder, tp_index=tp_index, tp=arguments.get("tp", 2))


def load_and_count(uri: str, folder: str, *, google: str = "", **arguments: Any) -> tuple[list[str], RankStatistics]:
    """Load one rank of `tp`; gives the names of wrong tensors and the statistics. `google` stands in for Google's address."""
    from huggingface_hub import constants

    from ray_streamer.storage import gcs

    # Both are settled when they are imported, and processes stay for several tests.
    constants.ENDPOINT = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    gcs._ENDPOINT = google or gcs._ENDPOINT
    statistics: list[RankStatistics] = []
    tensors = ray_streamer.load_rank(uri, on_statistics=statistics.append, **arguments)
    return oracle.faults(tensors, folder, tp_index=arguments["rank"], tp=arguments["tp"]), statistics[0]


def names_of_stage(uri: str, **arguments: Any) -> list[str]:
    """Load a stage of two; gives the names that this rank holds, each complete."""
    tensors = ray_streamer.load_rank(uri, pp=2, **arguments)
    wrong = oracle.faults(tensors, uri, share_of=lambda name: (0, 1) if name in tensors else None)
    assert not wrong
    return sorted(tensors)


def load_in_process_group(uri: str, folder: str, *, store: str, rank: int, world_size: int, **arguments: Any) -> Any:
    """Load twice as a member of a torch.distributed process group; gives both times the names of wrong tensors."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return [
            oracle.faults(ray_streamer.load_rank(uri, **arguments), folder, tp_index=rank, tp=world_size)
            for _ in range(2)
        ]
    finally:
        dist.destroy_process_group()


def load_on_a_machine_of_its_own(uri: str, folder: str, *, store: str, rank: int, **arguments: Any) -> list[str]:
    """Load in a process group of two, whose ranks take themselves to be on two machines; gives the names of wrong tensors."""
    import torch.distributed as dist

    from ray_streamer.api import process_group

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        with mock.patch.object(process_group, "this_machine", return_value=(f"machine-{rank}", "", 0)):
            return oracle.faults(ray_streamer.load_rank(uri, **arguments), folder, tp_index=rank, tp=2)
    finally:
        dist.destroy_process_group()


def load_without_the_other(uri: str, *, store: str, rank: int, is_alive: bool) -> str:
    """Load in a process group of two, whose second rank does not: it does something else, or leaves; gives the error."""
    from datetime import timedelta

    import torch.distributed as dist

    meeting = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2)
    # Short for what the load asks; to connect takes as long as it takes on a machine with other work.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    meeting.set(f"connected-{rank}", "")
    meeting.wait(["connected-0"], timedelta(seconds=60))
    try:
        if rank == 0:
            ray_streamer.load_rank(uri)
        elif is_alive:
            meeting.wait(["failed"], timedelta(seconds=60))
    except ray_streamer.errors.ClusterError as error:
        meeting.set("failed", "")
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def load_in_groups(uri: str, folder: str, *, store: str, rank: int, world_size: int) -> dict[str, list[str]]:
    """Load as a member of a group of all, and alone in a group of one; gives the names of wrong tensors."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        everybody = dist.new_group(list(range(world_size)))
        alone = [dist.new_group([number]) for number in range(world_size)]
        together = ray_streamer.load_rank(uri, group=everybody)
        mine = ray_streamer.load_rank(uri, group=alone[rank])
        try:
            ray_streamer.load_rank(uri, group=alone[1 - rank])
        except ray_streamer.errors.SettingsError as error:
            refused = str(error)
        return {
            "together": oracle.faults(together, folder, tp_index=rank, tp=world_size),
            "alone": oracle.faults(mine, folder),
            "refused": [refused],
        }
    finally:
        dist.destroy_process_group()


def load_in_attempts(attempts: list[dict[str, Any]], folder: str, *, tp_index: int, **arguments: Any) -> list[Any]:
    """Load until an attempt succeeds; gives the class of each attempt's error, and the wrong tensors of the last one."""
    outcomes: list[Any] = []
    for attempt in attempts:
        try:
            tensors = ray_streamer.load_rank(**arguments | attempt)
        except ray_streamer.errors.RayStreamerError as error:
            outcomes.append(type(error).__name__)
        else:
            return [*outcomes, oracle.faults(tensors, folder, tp_index=tp_index, tp=2)]
    return outcomes


def drop_streams_in_cycles(uri: str, *, num_streams: int, **arguments: Any) -> list[str]:
    """Take one tensor of each stream and drop its consumer, which is a cycle; gives what is left when nobody collects any more."""

    class Consumer:
        def __init__(self) -> None:
            self.stream = ray_streamer.stream_rank(uri, **arguments)
            self.step = self.take

        def take(self) -> Any:
            return next(self.stream)

    before = possessions()
    for _ in range(num_streams):
        Consumer().step()
    while left := Counter(possessions()) - Counter(before):
        pass  # whoever waits for the answer gives up at last
    return sorted(left)


def load_into_own_memory(uri: str, folder: str, *, rank: int, names: list[str], **arguments: Any) -> dict[str, bool]:
    """Load some tensors into memory of the caller's; gives what holds afterwards."""
    out = own_tensors(uri, rank=rank, world_size=arguments["world_size"], names=names)
    statistics: list[Any] = []
    tensors = ray_streamer.load_rank(uri, rank=rank, out=out, on_statistics=statistics.append, **arguments)
    return {
        "right": not oracle.faults(tensors, folder, tp_index=rank, tp=arguments["world_size"]),
        "same tensors": all(tensors[name] is out[name] for name in names),
        "statistics": [each.rank for each in statistics] == [rank]
        and statistics[0].bytes_delivered == sum(tensor.nbytes for tensor in tensors.values()),
    }


def own_tensors(uri: str, *, rank: int, world_size: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of ones, shaped like what the rank will hold."""
    plan = ray_streamer.plan(uri, world_size)
    tensors: dict[str, torch.Tensor] = {}
    for spec in plan.slices[rank].results:
        if names is None or spec.name in names:
            tensors[spec.name] = torch.ones(spec.shape, dtype=getattr(torch, spec.stored.torch_name))
    return tensors


_M_MMAP_THRESHOLD = -3

_held: dict[str, torch.Tensor] = {}


def hold_own_tensors(uri: str, *, rank: int, world_size: int) -> None:
    """Hold memory for all tensors of this rank, touched."""
    _held.update(own_tensors(uri, rank=rank, world_size=world_size))


def load_into_held(uri: str, **arguments: Any) -> Any:
    """Load into what is held, or into fresh tensors that are held then; gives this rank's statistics."""
    statistics: list[Any] = []
    _held.update(ray_streamer.load_rank(uri, out=dict(_held), on_statistics=statistics.append, **arguments))
    return statistics[0]


def free() -> None:
    """Hold nothing, and give back to the system what is free, now and whenever a tensor goes."""
    _held.clear()
    gc.collect()
    libc = ctypes.CDLL(None)
    # Without a fixed threshold, glibc learns to keep large pieces for itself.
    libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    libc.malloc_trim(0)


def stream(uri: str, folder: str, *, rank: int, **arguments: Any) -> dict[str, Any]:
    """Take every tensor, each compared as it comes; gives the names in order and those that were wrong by then."""
    names, wrong = [], []
    for name, tensor in ray_streamer.stream_rank(uri, rank=rank, **arguments):
        names.append(name)
        if name in oracle.faults({name: tensor}, folder, tp_index=rank, tp=arguments["world_size"]):
            wrong.append(name)
    return {"names": names, "wrong": wrong}


def stream_all(uri: str, **arguments: Any) -> list[str]:
    """Take every tensor; gives their names."""
    return [name for name, _ in ray_streamer.stream_rank(uri, **arguments)]


def stream_one_and_close(uri: str, *, gate: str, **arguments: Any) -> dict[str, Any]:
    """Take one tensor and no more; gives what this process had before, during and after."""
    before = possessions()
    stream = ray_streamer.stream_rank(uri, **arguments)
    name, _ = next(stream)
    wait_at(gate)
    during = possessions()
    stream.close()
    return {"name": name, "before": before, "during": during, "after": possessions()}


def stream_one_and_raise(uri: str, *, gate: str, **arguments: Any) -> None:
    """Take one tensor and fail in the loop."""
    for name, _ in ray_streamer.stream_rank(uri, **arguments):
        wait_at(gate)
        raise LookupError(f"no place for {name}")


def wait_at(gate: str) -> None:
    """Wait until the test opens this pipe."""
    with open(gate) as pipe:
        pipe.read()


def load_with_wrong_out(uri: str, **arguments: Any) -> tuple[str, list[str]]:
    """Fail before anything is read; gives the message, and what is left of the load."""
    before = possessions()
    try:
        ray_streamer.load_rank(uri, out={"model.norm.weight": torch.empty(3)}, **arguments)
    except DeviceError as error:
        message = str(error)
    return message, sorted(set(possessions()) - set(before))


def possessions() -> list[str]:
    """Threads of the package, its arenas and sockets, and the shard files that are open, in this process."""
    gc.collect()
    threads = [thread.name for thread in package_threads()]
    maps = [line.split()[5] for line in mappings_of("ray_streamer-arena")]
    files = [
        target
        for target in descriptors()
        if target.startswith(("socket:", "/memfd:ray_streamer")) or target.endswith(".safetensors")
    ]
    return sorted([*threads, *maps, *files])
