"""Does what examples/two_nodes.py does on every rank compute what one process does? In four processes without Ray."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import pytest
import torch
from api_support import example_tasks
from safetensors.torch import save_file

from ray_streamer.testing.s3_server import free_port
from ray_streamer.testing.spawned import answers_of

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_SECONDS = 250
SHAPES = {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}
NUM_LAYERS = 4


@pytest.mark.slow
def test_two_stages_of_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    weights = {
        f"model.layers.{layer}.mlp.{name}_proj.weight": torch.randn(shape)
        for layer in range(NUM_LAYERS)
        for name, shape in SHAPES.items()
    }
    # One file by its uri: MLP blocks are no whole model.
    save_file(weights, tmp_path / "mlp.safetensors")
    state = hidden = torch.randn(16)
    for layer in range(NUM_LAYERS):
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in SHAPES)
        state = state + down @ (torch.nn.functional.silu(gate @ state) * (up @ state))

    words = (str(tmp_path / "mlp.safetensors"), f"tcp://127.0.0.1:{free_port()}", hidden.tolist(), secrets.token_hex(8))
    answers = answers_of(
        example_tasks.serve_two_stages, [(rank, *words) for rank in range(4)], timeout_seconds=TIMEOUT_SECONDS
    )
    assert answers[:2] == [None, None]
    assert answers[2] == answers[3] == pytest.approx(state.tolist(), rel=1e-4)
