"""What does a dry run of vLLM's own loader take, before anything is read? Microseconds of CPU time for each tensor, beside the loader itself.

    .venv-vllm/bin/python benchmarks/dry_run.py

A mixture of experts with tiny tensors, on two ranks. "loader" is the model's `load_weights` with tensors that are in memory, "dry run" the same
with lazy tensors, until its slices are known. Each is the least of several runs, of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from conftest import ENVIRONMENT
from ranks import Layout, on_all_ranks

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.integrations.captured_slices import CapturedSlices
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


def save_checkpoint(folder: Path, *, layers: int, experts: int) -> None:
    """A Qwen3-MoE of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=layers, num_experts=experts, mlp_only_layers=[])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def least_microseconds(run: Callable[[], Any], *, num_tensors: int, num_runs: int) -> float:
    """CPU time of this process for each tensor."""
    taken: list[float] = []
    for _ in range(num_runs):
        used = time.process_time()
        run()
        taken.append(time.process_time() - used)
    return min(taken) / num_tensors * 1e6


def measure(folder: Path, num_runs: int, model: Any, _: Any) -> tuple[int, float, float]:
    """On one rank: tensors, and what either takes for each of them."""
    from safetensors.torch import load_file

    from ray_streamer.integrations.vllm.loader import targets_of

    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    storage = open_storage(str(folder), Settings())
    index = open_checkpoint(str(folder), storage)
    storage.close()

    def dry_run() -> None:
        captured = CapturedSlices(
            str(folder), Settings(), load=model.load_weights, targets=lambda: targets_of(model), skips=lambda _: False
        )
        captured(index, 0)

    least = partial(least_microseconds, num_tensors=len(tensors), num_runs=num_runs)
    return len(tensors), least(lambda: model.load_weights(iter(tensors.items()))), least(dry_run)


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_checkpoint(folder, layers=options.layers, experts=options.experts)
        ranks = on_all_ranks(folder, Layout(tp=2), [partial(measure, folder, options.runs)], Path(name))
    (num_tensors, *_), *_ = said = [loaded.said for (loaded,) in ranks]
    loader, dry_run = (max(row[column] for row in said) for column in (1, 2))
    print(f"{num_tensors} tensors: loader {loader:.0f} us, dry run {dry_run:.0f} us for each")


if __name__ == "__main__":
    main()
