"""The Serve example answers over HTTP with the tokens of the model, streams them, and goes on when a rank is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from ray_streamer.testing.s3_server import free_port

TIMEOUT_SECONDS = 400
PROMPT = [5, 17, 42, 99, 7, 28, 3, 64]
NUM_TOKENS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(450),
    pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="Ray Serve is not installed here"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama that never ends by itself."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=97,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    # Far from ties: rounding on two ranks changes no token.
    model.lm_head.weight.data.mul_(50)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_the_serve_example_answers_streams_and_survives_the_kill_of_a_rank(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([PROMPT])
    expected = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(PROMPT) :].tolist()
    wish = json.dumps({"prompt": PROMPT, "num_tokens": NUM_TOKENS})
    command = [sys.executable, Path(__file__).with_name("serve_process.py"), str(folder), str(free_port()), wish]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    # With its dashboard's packages installed, Ray starts slowly on a busy machine.
    environment = os.environ | {"PYTHONPATH": path, "RAY_raylet_start_wait_time_s": "150"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)
    answers = [line.partition("ANSWER ")[2] for line in ended.stdout.splitlines() if line.startswith("ANSWER ")]
    assert (ended.returncode, len(answers)) == (0, 1), ended.stdout[-3000:] + ended.stderr[-6000:]
    said = json.loads(answers[0])
    assert said == {
        "whole": expected,
        "streamed": expected,
        "first_of_an_endless_one": expected[0],
        "after_that_was_dropped": expected,
        "refused": 500,
        "killed_in_a_stream": expected,
        "killed_between_requests": expected,
        "num_ranks": [2, 2, 2],
        "alive_at_the_end": 0,
    }
