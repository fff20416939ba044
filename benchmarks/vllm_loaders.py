"""How do load formats compare inside vLLM's engine? Seconds, CPU, memory and bytes served, from an S3 server and from a local disk.

Each run is a whole engine of its own, `LLM(...)`, in processes forked from one that has imported vLLM, so imports are paid before.

whole call   `LLM(...)` until it can answer; where files are downloaded first, with the download
weights      the loader's `load_weights`, of the slowest rank, with the download
CPU          user and system time of all ranks meanwhile, with the download
peak         what a rank's resident memory grew by meanwhile, less its parameters; memory that ranks share counts in each

The order of contenders is turned each round. All of them must end with the same parameters, or the benchmark fails.

Runs in the environment of `make test-vllm`, with Run:ai's streamer installed into it:

    .venv-vllm/bin/python -m pip install runai-model-streamer runai-model-streamer-s3
    .venv-vllm/bin/python benchmarks/vllm_loaders.py --gigabytes 1.3 --rounds 3
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from conftest import ENVIRONMENT
from engines import in_a_fork
from forks import import_once

from ray_streamer.testing.s3_server import start_s3_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
PLACES = ("s3", "disk", "page-cache")
LOADERS = "vllm.model_executor.model_loader"


@dataclass(frozen=True)
class Store:
    """Where the checkpoint is.

    Attributes:
        uri: In the S3 server.
        model: As files.
        config: config.json alone.
        download: An empty folder, for who downloads first.
    """

    uri: str
    model: Path
    config: Path
    download: Path


@dataclass(frozen=True)
class Contender:
    """A load format, and what an engine is told so that it loads by it.

    Attributes:
        loader: Its module and class.
        from_s3: Arguments of the engine for the checkpoint in S3.
        from_disk: For the same as files.
        downloads: Whether files come from S3 to the disk first.
        least_tp: With fewer ranks it is another contender.
    """

    loader: tuple[str, str]
    from_s3: Callable[[Store], dict[str, Any]]
    from_disk: Callable[[Store], dict[str, Any]]
    downloads: bool = False
    least_tp: int = 1

    def engine(self, place: str, store: Store) -> dict[str, Any]:
        """Arguments of the engine."""
        return self.from_s3(store) if place == "s3" else self.from_disk(store)


RUNAI = (f"{LOADERS}.runai_streamer_loader", "RunaiModelStreamerLoader")
DISTRIBUTED = {"load_format": "runai_streamer", "model_loader_extra_config": {"distributed": True}}
CONTENDERS = {
    "ray_streamer": Contender(
        loader=("ray_streamer.integrations.vllm.loader", "RayStreamerLoader"),
        from_s3=lambda store: {
            "model": str(store.config),
            "load_format": "ray_streamer",
            "model_loader_extra_config": {"uri": store.uri},
        },
        from_disk=lambda store: {"model": str(store.model), "load_format": "ray_streamer"},
    ),
    "runai_streamer": Contender(
        loader=RUNAI,
        from_s3=lambda store: {"model": store.uri, "load_format": "runai_streamer"},
        from_disk=lambda store: {"model": str(store.model), "load_format": "runai_streamer"},
    ),
    "runai_streamer, distributed": Contender(
        loader=RUNAI,
        from_s3=lambda store: {"model": store.uri, **DISTRIBUTED},
        from_disk=lambda store: {"model": str(store.model), **DISTRIBUTED},
        least_tp=2,
    ),
    "vLLM's default": Contender(
        loader=(f"{LOADERS}.default_loader", "DefaultModelLoader"),
        from_s3=lambda store: {"model": str(store.download)},
        from_disk=lambda store: {"model": str(store.model)},
        downloads=True,
    ),
}


@dataclass(frozen=True)
class Run:
    """What one engine took."""

    call_seconds: float
    weights_seconds: float
    cpu_seconds: float
    peak_bytes: int
    sent_bytes: int


def main() -> None:
    """Runs all contenders and prints a table, in the Markdown of docs/performance.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--place", nargs="*", default=list(PLACES), choices=PLACES)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # What tests hide of Run:ai's streamer is there again.
    sys.modules.pop("runai_model_streamer", None)
    import_once()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["VLLM_ASSETS_CACHE"] = str(scratch / "assets")
        model, config = scratch / "model", scratch / "config"
        save_checkpoint(model, num_layers=max(1, round((options.gigabytes * 1e9 - 2.6e8) / LAYER_BYTES)))
        config.mkdir()
        shutil.copy(model / "config.json", config)
        total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB of weights, {options.rounds} rounds, load average {os.getloadavg()}", flush=True)
        with start_s3_server() as server:
            os.environ.update(server.environment())
            os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
            store = Store(server.upload_folder(model, "benchmark", "model"), model, config, scratch / "download")
            for place in options.place:
                for tp in options.tp:
                    names = [name for name in options.only if CONTENDERS[name].least_tp <= tp]
                    print_table(place, tp, measure(names, options.rounds, place, tp, store, server, scratch), total)


def save_checkpoint(folder: Path, *, num_layers: int) -> None:
    """A Llama of random bits, in files of up to a gibibyte, on the disk."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES, num_hidden_layers=num_layers, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    files = list(_grouped(shapes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Exponents below those of infinity and of no number.
        bits = {name: torch.randint(0, 0x3F80, shapes[name], dtype=torch.int16) for name in names}
        save_file({name: tensor.view(torch.bfloat16) for name, tensor in bits.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.sync()


def _grouped(shapes: dict[str, Any]) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        if num_bytes >= FILE_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += 2 * shape.numel()
    yield names


def measure(
    names: list[str], num_rounds: int, place: str, tp: int, store: Store, server: S3Server, scratch: Path
) -> dict[str, list[Run]]:
    """What each contender took in each round."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    hashes: Any = None
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            store.download.mkdir()
            _prepare(place, store)
            sent = server.bytes_sent()
            status, said, log = in_a_fork(
                scratch / "engine.log", functools.partial(run_engine, CONTENDERS[name], place, tp, store)
            )
            assert said is not None, f"{name} ended with {status}:\n{log[-6000:]}"
            hashes = hashes or said.pop("hashes")
            assert said.pop("hashes", hashes) == hashes, f"{name} loaded something else"
            runs[name].append(Run(**said, sent_bytes=server.bytes_sent() - sent))
            shutil.rmtree(store.download)
            print(place, tp, name, runs[name][-1], file=sys.stderr, flush=True)
    return runs


def _prepare(place: str, store: Store) -> None:
    """The files are in the page cache, or they are not."""
    for path in store.model.glob("*.safetensors"):
        with path.open("rb") as file:
            if place == "page-cache":
                while file.read(1 << 24):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_engine(contender: Contender, place: str, tp: int, store: Store) -> None:
    """In a process of its own: the engine, and what it took, on standard output."""
    from vllm import LLM

    loader = getattr(import_module(contender.loader[0]), contender.loader[1])
    with tempfile.TemporaryDirectory() as folder:
        loader.load_weights = _measured(loader.load_weights, Path(folder))
        used, started = _cpu_seconds(), time.perf_counter()
        if contender.downloads and place == "s3":
            _download(store)
        downloaded, used = time.perf_counter() - started, _cpu_seconds() - used
        llm = LLM(
            **contender.engine(place, store),
            tensor_parallel_size=tp,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=2,
            worker_extension_cls="probe.Probe",
        )
        seconds = time.perf_counter() - started
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        assert len(ranks) == tp
        said = {
            "call_seconds": seconds,
            "weights_seconds": downloaded + max(rank["seconds"] for rank in ranks),
            "cpu_seconds": used + sum(rank["cpu_seconds"] for rank in ranks),
            "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
            "hashes": llm.collective_rpc("parameter_hashes"),
        }
        print("ANSWER " + json.dumps(said), flush=True)


def _download(store: Store) -> None:
    """All files, by boto3's transfer manager."""
    import boto3

    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        client.download_file(bucket, entry["Key"], str(store.download / Path(entry["Key"]).name))


def _measured(load_weights: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The same function; what it took is in a file of `folder` then."""

    @functools.wraps(load_weights)
    def measured(self: Any, model: Any, model_config: Any) -> Any:
        resident = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        used, started = _cpu_seconds(), time.perf_counter()
        result = load_weights(self, model, model_config)
        taken = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - used}
        parameters = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
        held = sum(parameter.untyped_storage().nbytes() for parameter in parameters.values())
        taken["peak_bytes"] = _memory("VmHWM") - resident - held
        (folder / f"{os.getpid()}.json").write_text(json.dumps(taken))
        return result

    return measured


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def print_table(place: str, tp: int, runs: dict[str, list[Run]], total: int) -> None:
    """Medians of the rounds, and the largest peak."""

    def median(runs: list[Run], field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs)

    print(f"\n{place}, tp={tp}, load average {os.getloadavg()[0]:.1f}\n")
    print("| load format | weights, seconds (min-max) | whole call | CPU s | peak, MiB per rank | bytes served |")
    print("|---|---|---|---|---|---|")
    for name, done in runs.items():
        seconds = sorted(run.weights_seconds for run in done)
        print(
            f"| {name} | {median(done, 'weights_seconds'):.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f}) "
            f"| {median(done, 'call_seconds'):.1f} | {median(done, 'cpu_seconds'):.2f} "
            f"| {max(run.peak_bytes for run in done) / 2**20:.0f} | {median(done, 'sent_bytes') / total:.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
