"""The Serve example answers over HTTP with the tokens of the model, streams them, and goes on when a rank is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_SECONDS = 400
PROMPT = [5, 17, 42, 99, 7, 28, 3, 64]
NUM_TOKENS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(450),
    pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="Ray Serve is not installed here"),
]


REFUSED = [
    ({}, "prompt must be a list of token ids"),
    ({"prompt": "no token ids"}, "prompt must be a list of token ids"),
    ({"prompt": []}, "with at least one"),
    ({"prompt": [5, 131]}, "from 0 to 130"),
    ({"prompt": [-1]}, "from 0 to 130"),
    ({"prompt": [5, True]}, "from 0 to 130"),
    ({"prompt": [[5, 17]]}, "from 0 to 130"),
    ({"prompt": PROMPT, "max_new_tokens": 0}, "max_new_tokens must be"),
    ({"prompt": PROMPT, "max_new_tokens": "8"}, "max_new_tokens must be"),
    ({"prompt": PROMPT, "stream": "yes"}, "stream must be"),
    (PROMPT, "the body must be a JSON object"),
]
"""Requests that cannot be answered, and a part of the sentence that they get."""


def test_the_serve_example_answers_streams_and_survives_the_kill_of_a_rank(
    save_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    # It never ends by itself.
    folder = save_tiny_llama(tmp_path, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([PROMPT])
    expected = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(PROMPT) :].tolist()
    wish = json.dumps({"prompt": PROMPT, "num_tokens": NUM_TOKENS, "refused": [body for body, _ in REFUSED]})
    command = [sys.executable, Path(__file__).with_name("serve_process.py"), str(folder), str(free_port()), wish]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    # With its dashboard's packages installed, Ray starts slowly on a busy machine.
    environment = os.environ | {"PYTHONPATH": path, "RAY_raylet_start_wait_time_s": "150"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)
    answers = [line.partition("ANSWER ")[2] for line in ended.stdout.splitlines() if line.startswith("ANSWER ")]
    assert (ended.returncode, len(answers)) == (0, 1), ended.stdout[-3000:] + ended.stderr[-6000:]
    said = json.loads(answers[0])
    for (body, sentence), (status, told) in zip(REFUSED, said.pop("refused"), strict=True):
        assert (status, sentence in told) == (400, True), (body, status, told)
    assert said == {
        "whole": expected,
        "streamed": expected,
        "first_of_an_endless_one": expected[0],
        "after_that_was_dropped": expected,
        "killed_in_a_stream": expected,
        "killed_between_requests": expected,
        "num_ranks": [2, 2, 2],
        "alive_at_the_end": 0,
    }
