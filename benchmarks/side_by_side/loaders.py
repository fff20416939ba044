"""How does each contender load? One class for each, in the rank's process: its imports when it is made, and its load.

Every load ends with the same: this rank's parts of all tensors, by name. Who reads whole tensors cuts the rank's part out and copies
it, as an engine copies it into a parameter. Who reads local files only downloads them first where the checkpoint is on a server.
Nothing of this project is imported but by its own class.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Protocol

from side_by_side.downloads import Files
from side_by_side.parts import Tensors, Windows, cut

if TYPE_CHECKING:
    from side_by_side.task import Task


class Loader(Protocol):
    """One contender in one rank."""

    def __init__(self, task: Task) -> None:
        """Imports what a script imports at its top, and joins the other ranks where the contender needs them."""
        ...

    def load(self) -> Tensors:
        """This rank's tensors."""
        ...


class RayStreamer:
    """This project: each byte is read once by one rank, and shared over the node."""

    def __init__(self, task: Task) -> None:
        import torch  # noqa: F401

        import ray_streamer

        if task.uri.startswith("s3://"):
            import boto3  # noqa: F401
        self.task = task
        self.load_rank = ray_streamer.load_rank

    def load(self) -> Tensors:
        return self.load_rank(
            self.task.uri,
            rank=self.task.rank,
            world_size=self.task.world_size,
            session=self.task.session,
            memory_limit=self.task.staging_bytes,
        )


class Runai:
    """Run:ai's streamer: every rank streams every tensor and keeps its part, as inside vLLM."""

    is_distributed = False

    def __init__(self, task: Task) -> None:
        # Objects of a bucket by path, since nobody resolves names of buckets here.
        os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
        import torch  # noqa: F401
        from runai_model_streamer import SafetensorsStreamer

        if self.is_distributed:
            _join(task)
        self.task = task
        self.streamer = SafetensorsStreamer

    def load(self) -> Tensors:
        tensors: Tensors = {}
        paths = [f"{self.task.uri}/{name}" for name in self.task.weight_files]
        with self.streamer() as streamer:
            streamer.stream_files(paths, device="cpu", is_distributed=self.is_distributed)
            for name, tensor in streamer.get_tensors():
                tensors[name] = cut(tensor, self.task.windows[name]).clone()
        return tensors


class RunaiDistributed(Runai):
    """The same in its distributed mode: each rank reads a part, and broadcasts it through torch.distributed."""

    is_distributed = True


class SafetensorsSlices:
    """`safe_open`, `get_slice`, clone: every rank maps every file and copies its parts out."""

    def __init__(self, task: Task) -> None:
        import torch  # noqa: F401
        from safetensors import safe_open

        self.open, self.windows, self.files = safe_open, task.windows, Files(task)

    def load(self) -> Tensors:
        tensors: Tensors = {}
        for path in self.files.fetch():
            with self.open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = _sliced(opened.get_slice(name), self.windows[name]).clone()
        return tensors


class SafetensorsWhole:
    """`load_file` of every file; the rank's part is a view where it is contiguous, and stays mapped to the file."""

    def __init__(self, task: Task) -> None:
        import torch  # noqa: F401
        from safetensors.torch import load_file

        self.load_file, self.windows, self.files = load_file, task.windows, Files(task)

    def load(self) -> Tensors:
        return {
            name: cut(tensor, self.windows[name]).contiguous()
            for path in self.files.fetch()
            for name, tensor in self.load_file(path).items()
        }


class Boto3:
    """Every rank brings every file into memory by boto3's transfer manager, and keeps its parts."""

    def __init__(self, task: Task) -> None:
        import boto3
        import torch  # noqa: F401
        from safetensors.torch import load

        self.task, self.load_bytes, self.boto3 = task, load, boto3

    def load(self) -> Tensors:
        import io

        bucket, _, prefix = self.task.uri.removeprefix("s3://").partition("/")
        client = self.boto3.client("s3")
        tensors: Tensors = {}
        for name in self.task.weight_files:
            memory = io.BytesIO()
            client.download_fileobj(bucket, f"{prefix}/{name}", memory)
            tensors |= _cut_all(self.load_bytes(memory.getvalue()), self.task.windows)
        return tensors


class Transformers:
    """`from_pretrained` of transformers with its own tensor-parallel plan."""

    def __init__(self, task: Task) -> None:
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        os.environ |= {name: str(task.rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": str(task.world_size)}
        _join(task)
        self.model_class, self.files = LlamaForCausalLM, Files(task)
        self.options = {"distributed_config": DistributedConfig(tp_size=task.world_size, tp_plan="auto")}

    def load(self) -> Tensors:
        self.files.fetch()
        model = self.model_class.from_pretrained(self.files.folder, dtype="bfloat16", **self.options)
        return {name: getattr(parameter, "_local_tensor", parameter) for name, parameter in model.named_parameters()}


class Dcp:
    """`torch.distributed.checkpoint.load` of a state dict of DTensors, through its reader of safetensors."""

    def __init__(self, task: Task) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        _join(task)
        self.dcp, self.dtensor, self.windows, self.files = dcp, DTensor, task.windows, Files(task)
        self.mesh = init_device_mesh("cpu", (task.world_size,))
        self.reader = self._reader()

    def _reader(self) -> Any:
        return self.dcp.HuggingFaceStorageReader

    def load(self) -> Tensors:
        paths = self.files.fetch()
        state = {name: tensor for path in paths for name, tensor in self._state_of(path).items()}
        self.dcp.load(state, storage_reader=self.reader(str(self.files.folder)))
        return {name: each.to_local() if isinstance(each, self.dtensor) else each for name, each in state.items()}

    def _state_of(self, path: str) -> dict[str, Any]:
        """Empty tensors of one file's names: what a model that is not loaded yet has."""
        import torch
        from torch.distributed.tensor import Shard

        state: dict[str, Any] = {}
        for name, shape in _shapes(path).items():
            window = self.windows[name]
            if window is not None:
                shape[window[0]] = window[2] - window[1]
            local = torch.empty(shape, dtype=torch.bfloat16)
            state[name] = local if window is None else self.dtensor.from_local(local, self.mesh, [Shard(window[0])])
        return state


class DcpByRayStreamer(Dcp):
    """The same through this project's reader."""

    def _reader(self) -> Any:
        from ray_streamer.integrations.dcp import StorageReader

        return StorageReader


class Fastsafetensors:
    """fastsafetensors: files are shared out among the ranks, which read them whole and scatter the parts."""

    def __init__(self, task: Task) -> None:
        import torch.distributed as dist
        from fastsafetensors import SafeTensorsFileLoader

        _join(task)
        self.task, self.files = task, Files(task)
        self.loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", nogds=True)

    def load(self) -> Tensors:
        paths, ranks = self.files.fetch(), self.task.world_size
        self.loader.add_filenames({rank: paths[rank::ranks] for rank in range(ranks)})
        # Tensors are good as long as it is open: until this process ends.
        self.buffers = self.loader.copy_files_to_device()
        return {
            name: self.buffers.get_tensor(name) if window is None else self.buffers.get_sharded(name, window[0])
            # Every rank asks in the same order, since the ranks answer each other.
            for name, window in sorted(self.task.windows.items())
        }


LOADERS: dict[str, type[Any]] = {
    "ray_streamer": RayStreamer,
    "runai": Runai,
    "runai, distributed": RunaiDistributed,
    "safetensors, slices": SafetensorsSlices,
    "safetensors, whole files": SafetensorsWhole,
    "boto3": Boto3,
    "transformers": Transformers,
    "dcp": Dcp,
    "dcp, ray_streamer": DcpByRayStreamer,
    "fastsafetensors": Fastsafetensors,
}


def _join(task: Task) -> None:
    """Torch's process group of all ranks."""
    import torch.distributed as dist

    meeting = f"tcp://127.0.0.1:{task.port}"
    dist.init_process_group("gloo", init_method=meeting, rank=task.rank, world_size=task.world_size)


def _shapes(path: str) -> dict[str, list[int]]:
    """Of each tensor of a file, of which nothing but the header is read, ahead neither."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _sliced(tensor: Any, window: list[int] | None) -> Any:
    if window is None:
        return tensor[:]
    dim, start, stop = window
    return tensor[(slice(None),) * dim + (slice(start, stop),)]


def _cut_all(tensors: Tensors, windows: Windows) -> Tensors:
    return {name: cut(tensor, windows[name]).clone() for name, tensor in tensors.items()}
