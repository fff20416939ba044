"""Does what examples/two_nodes.py does on every rank compute what one process does? On two Ray nodes, and in four processes without Ray."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import ray
import torch
from api_support import example_tasks
from safetensors.torch import save_file

import ray_streamer
from ray_streamer.testing.s3_server import free_port
from ray_streamer.testing.spawned import answers_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 250
SHAPES = {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}
NUM_LAYERS = 4


@dataclass(frozen=True)
class MlpBlocks:
    """The MLP blocks of a Llama in one file; they are no whole model, so it is opened by its own uri.

    Attributes:
        uri: Of the file.
        hidden: A state that goes in.
        answer: What one process computes of it.
    """

    uri: str
    hidden: list[float]
    answer: list[float]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> MlpBlocks:
    folder: Path = tmp_path_factory.mktemp("mlp")
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    weights = {
        f"model.layers.{layer}.mlp.{name}_proj.weight": torch.randn(shape)
        for layer in range(NUM_LAYERS)
        for name, shape in SHAPES.items()
    }
    save_file(weights, folder / "mlp.safetensors")
    state = hidden = torch.randn(16)
    for layer in range(NUM_LAYERS):
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in SHAPES)
        state = state + down @ (torch.nn.functional.silu(gate @ state) * (up @ state))
    return MlpBlocks(str(folder / "mlp.safetensors"), hidden.tolist(), state.tolist())


def test_two_stages_of_two_ranks_compute_what_one_process_does(blocks: MlpBlocks) -> None:
    words = (blocks.uri, f"tcp://127.0.0.1:{free_port()}", blocks.hidden, secrets.token_hex(8))
    answers = answers_of(
        example_tasks.serve_two_stages, [(rank, *words) for rank in range(4)], timeout_seconds=TIMEOUT_SECONDS
    )
    assert answers[:2] == [None, None]
    assert answers[2] == answers[3] == pytest.approx(blocks.answer, rel=1e-4)


@pytest.mark.usefixtures("ray_cluster")
def test_two_ray_nodes_hold_a_stage_each_and_answer_twice(blocks: MlpBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    example = example_tasks.loaded_example("two_nodes")
    # As a job's own script, which the actors cannot import.
    monkeypatch.setitem(sys.modules, example.__name__, example)
    ray.cloudpickle.register_pickle_by_value(example)
    with ray_streamer.load_sharded(blocks.uri, tp=2, pp=2) as model:
        assert model.plan.topology.nodes == ((0, 1), (2, 3))
        assert len(set(model.stats().nodes)) == 2
        # The ranks leave torch's process group after an answer, and meet anew for the next one.
        for _ in range(2):
            assert example.answer(model, blocks.hidden) == pytest.approx(blocks.answer, rel=1e-4)
