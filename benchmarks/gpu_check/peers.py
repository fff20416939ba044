"""Who else loads onto a GPU, and how long do they take? Same files, same process, same device; one after the other in each round.

    whole     every tensor of the checkpoint
    slices    what the first of four ranks holds

Who does not import is said to be missing, who fails or loads something else is named with the reason. The interfaces of fastsafetensors 0.5, runai-model-streamer and
InstantTensor 0.2 were taken from their documentation and sources. The first two were tried on tensors in host memory; none of the
three has been run on a GPU yet.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from ground import Ground, load
from plans import llama_plan

from ray_streamer.testing.parts import window_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, Any]
SLICED_TP = 4


def whole_contenders(ground: Ground, folder: Path) -> dict[str, Callable[[], Tensors]]:
    """Every tensor; this project first."""
    files, device = _files(folder), str(ground.torch_device)
    plan, own = llama_plan(folder, 1), ground.open_device()
    return {
        "ray_streamer": lambda: load(ground, plan, device=own),
        "safetensors.torch.load_file": lambda: _load_file(files, device),
        "fastsafetensors": lambda: _fastsafetensors(files, device),
        "runai-model-streamer": lambda: _runai(files, device),
        "instanttensor": lambda: _instanttensor(files, ground),
    }


def slice_contenders(ground: Ground, folder: Path) -> dict[str, Callable[[], Tensors]]:
    """One rank's slices; this project first."""
    plan, own = llama_plan(folder, SLICED_TP, is_shared=False), ground.open_device()
    return {
        "ray_streamer": lambda: load(ground, plan, device=own),
        "safe_open, get_slice, to": lambda: _slices(plan, folder, str(ground.torch_device)),
    }


def check(ground: Ground, folder: Path, *, state: str) -> dict[str, Any]:
    """Medians of all contenders; `state` is "warm", or "cold" where the files leave the page cache before each run."""
    groups = {"whole": whole_contenders(ground, folder), "slices": slice_contenders(ground, folder)}
    return {kind: _compare(ground, folder, contenders, state) for kind, contenders in groups.items()}


def _compare(ground: Ground, folder: Path, contenders: dict[str, Callable[[], Tensors]], state: str) -> dict[str, Any]:
    """One round that is not counted, in which all must load the same, then the rounds that are."""
    problems: dict[str, str] = {}
    expected: Tensors = {}
    for name, run in contenders.items():
        try:
            tensors = run()
            expected = expected or tensors
            if not are_equal(tensors, expected):
                problems[name] = f"loads something else than {next(iter(contenders))}"
        except ImportError as error:
            problems[name] = f"not installed ({error})"
        except Exception as error:
            problems[name] = f"failed: {type(error).__name__}: {error}"
    num_bytes = sum(tensor.nbytes for tensor in expected.values())
    expected = tensors = {}
    running = {name: run for name, run in contenders.items() if name not in problems}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ground.num_rounds):
        for name, run in running.items():
            if state == "cold":
                drop_page_cache(folder)
            started = time.perf_counter()
            tensors = run()
            ground.synchronize()
            seconds[name].append(time.perf_counter() - started)
            tensors = {}
    first = statistics.median(next(iter(seconds.values())))
    return {
        name: {"problem": problems[name]} if name in problems else _row(seconds[name], first, num_bytes)
        for name in contenders
    }


def _row(seconds: list[float], first: float, num_bytes: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "ratio": median / first,
        "gbps": num_bytes / median / 1e9,
    }


def are_equal(left: Tensors, right: Tensors) -> bool:
    """Whether both have the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in right
    )


def drop_page_cache(folder: Path) -> None:
    """Asks the kernel to forget the files; tmpfs cannot."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.safetensors"))


def _load_file(files: list[str], device: str) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file, device=device).items()}


def _slices(plan: Any, folder: Path, device: str) -> Tensors:
    from safetensors import safe_open

    tensors: Tensors = {}
    for number, file in enumerate(plan.index.files):
        with safe_open(folder / file.path, "pt") as opened:
            for position in [at for at in range(len(plan.index)) if plan.index.file_ids[at] == number]:
                name, window = plan.index.names[position], window_of(plan.index, plan.slices[0], position)
                tensors[name] = opened.get_slice(name)[window].to(device, copy=True)
    return tensors


def _fastsafetensors(files: list[str], device: str) -> Tensors:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(files, device=device, nogds=True) as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - not a mapping


def _runai(files: list[str], device: str) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}


def _instanttensor(files: list[str], ground: Ground) -> Tensors:
    from instanttensor import safe_open

    if ground.is_fake:
        raise ImportError("needs a GPU")
    with safe_open(files, framework="pt", device=0) as opened:
        return dict(opened.tensors())
