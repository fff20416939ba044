"""How do load formats compare inside vLLM, from one S3 server, at tp=2? Seconds, CPU, memory and bytes served.

Each contender fills a model of vLLM in two forked rank processes, as vLLM's workers do it, in processes of its own. Imports and the
model's construction are paid before. Seconds are those of the slowest rank, from the moment both are ready. Memory is a rank's peak
beyond what it held before, with all parameters in memory already. The order of contenders is turned each round.

Runs in the environment of `make test-vllm`, with `runai-model-streamer[s3]` and Run:ai's other requirements installed:

    .venv-vllm/bin/python benchmarks/vllm_loaders.py --gigabytes 1.3 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from conftest import ENVIRONMENT
from ranks import Layout, on_all_ranks

from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.testing.s3_server import S3Server

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632)
FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Taken:
    """What one rank took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> None:
    """Runs all contenders and prints a table, in the Markdown of docs/performance.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    _import_vllm()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        save_checkpoint(scratch / "model", num_layers=max(1, round(options.gigabytes * 1e9 / LAYER_BYTES) - 3))
        with start_s3_server() as server:
            os.environ.update(server.environment())
            os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
            uri = server.upload_folder(scratch / "model", "benchmark", "model")
            config = scratch / "config"
            config.mkdir()
            shutil.copy(scratch / "model" / "config.json", config)
            total = sum(path.stat().st_size for path in (scratch / "model").glob("*.safetensors"))
            shutil.rmtree(scratch / "model")
            runs = _measure(options.only, options.rounds, config, uri, server, scratch)
    print_table(runs, total)


def save_checkpoint(folder: Path, *, num_layers: int) -> None:
    """A Llama of random bits, in files of up to a gibibyte."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES, num_hidden_layers=num_layers, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: list[dict[str, torch.Tensor]] = [{}]
    torch.manual_seed(0)
    for name, shape in shapes.items():
        if sum(tensor.nbytes for tensor in files[-1].values()) >= FILE_BYTES:
            files.append({})
        # Exponents below those of infinity and of no number.
        bits = torch.randint(0, 0x3F80, shape, dtype=torch.int16)
        files[-1][name] = bits.view(torch.bfloat16)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def ours(uri: str, folder: Path, model: Any, model_config: Any) -> None:
    """Load format ray_streamer, default settings."""
    from vllm.config import LoadConfig

    from ray_streamer.integrations.vllm.loader import RayStreamerLoader

    RayStreamerLoader(LoadConfig(load_format="ray_streamer", model_loader_extra_config={"uri": uri})).load_weights(
        model, model_config
    )


def runai(uri: str, folder: Path, model: Any, model_config: Any, *, distributed: bool) -> None:
    """Load format runai_streamer, default settings; or one that broadcasts what each rank read."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

    extra = {"distributed": True} if distributed else {}
    model_config.model_weights = uri
    RunaiModelStreamerLoader(LoadConfig(load_format="runai_streamer", model_loader_extra_config=extra)).load_weights(
        model, model_config
    )


def stock_after_download(uri: str, folder: Path, model: Any, model_config: Any) -> None:
    """One rank downloads all files with boto3's transfer manager; then vLLM's default loader."""
    import boto3
    import torch.distributed as dist
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import DefaultModelLoader

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if dist.get_rank() == 0:
        client = boto3.client("s3")
        for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
            client.download_file(bucket, entry["Key"], str(folder / Path(entry["Key"]).name))
    dist.barrier()
    model_config.model = str(folder)
    DefaultModelLoader(LoadConfig(load_format="safetensors")).load_weights(model, model_config)


CONTENDERS: dict[str, Callable[[str, Path, Any, Any], None]] = {
    "ray_streamer": ours,
    "runai_streamer": partial(runai, distributed=False),
    "runai_streamer, distributed": partial(runai, distributed=True),
    "safetensors after a download": stock_after_download,
}


def measured(load: Callable[[Any, Any], None], model: Any, model_config: Any) -> Taken:
    """Runs `load`, in a rank."""
    import torch.distributed as dist

    dist.barrier()
    before, rss = resource.getrusage(resource.RUSAGE_SELF), _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    load(model, model_config)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(seconds, cpu, _memory("VmHWM") - rss)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _measure(
    names: list[str], num_rounds: int, config: Path, uri: str, server: S3Server, scratch: Path
) -> dict[str, list[tuple[list[Taken], int]]]:
    """For each contender and round what its ranks took, and what the server sent."""
    runs: dict[str, list[tuple[list[Taken], int]]] = {name: [] for name in names}
    hashes: dict[str, Any] = {}
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            folder = scratch / "downloaded"
            folder.mkdir()
            sent = server.bytes_sent()
            load = partial(CONTENDERS[name], uri, folder)
            ranks = on_all_ranks(config, Layout(tp=2), [partial(measured, load)], scratch)
            sent = server.bytes_sent() - sent
            shutil.rmtree(folder)
            runs[name].append(([rank.said for [rank] in ranks], sent))
            hashes[name] = [rank.before for [rank] in ranks]
            assert hashes[name] == hashes[names[0]], f"{name} loaded something else"
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    return runs


def print_table(runs: dict[str, list[tuple[list[Taken], int]]], total: int) -> None:
    """Medians of the rounds."""
    print(f"{total / 1e9:.2f} GB of weights\n")
    print("| load format | seconds | CPU seconds, both ranks | peak beside parameters, per rank | bytes served |")
    print("|---|---|---|---|---|")
    for name, rounds in runs.items():
        seconds = statistics.median(max(rank.seconds for rank in ranks) for ranks, _ in rounds)
        cpu = statistics.median(sum(rank.cpu_seconds for rank in ranks) for ranks, _ in rounds)
        peak = max(rank.peak_bytes for ranks, _ in rounds for rank in ranks)
        sent = statistics.median(sent for _, sent in rounds)
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} | {peak / 2**20:.0f} MiB | {sent / total:.2f}x |")


def _import_vllm() -> None:
    """Before ranks are forked; what tests hide of Run:ai's streamer is there again."""
    sys.modules.pop("runai_model_streamer", None)
    import ray_streamer.integrations.vllm.loader  # noqa: F401


if __name__ == "__main__":
    main()
