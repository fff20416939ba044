"""How does a model of vLLM load without the engine? Each rank is a process forked from one that has vLLM imported already.

A rank builds its part of the model as vLLM's worker does, has a loader fill it, and says what every parameter and buffer holds:
by hash, before and after vLLM processes them for its kernels.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forks import import_once

from ray_streamer.testing.s3_server import free_port

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_SECONDS = 240
END_SECONDS = 30

_numbers = itertools.count()

Fill = Callable[[Any, Any], Any]
"""Fills a model: called with it and vLLM's model_config; what it returns is handed to the test."""
Then = Callable[[Any, Any], Any]
"""What is done with a loaded model: called with vLLM's whole configuration and it; what it returns is handed to the test."""


@dataclass
class Loaded:
    """What one rank says after a load."""

    before: dict[str, str]
    after: dict[str, str]
    said: Any = None
    later: Any = None


@dataclass(frozen=True)
class Layout:
    """How ranks share a model."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def engine_size(self) -> int:
        """Ranks of one engine."""
        return self.tp * self.pp


def on_all_ranks(
    folder: Path, layout: Layout, fills: list[Fill], scratch: Path, then: Then | None = None
) -> list[list[Loaded]]:
    """For each rank what each of `fills` left in a new model of its own, and what became of it by `then`.

    Raises:
        AssertionError: A rank failed; says how.
    """
    import_once()
    context = multiprocessing.get_context("fork")
    ranks = []
    # vLLM's ranks share memory under this name; one that failed leaves it behind.
    os.environ["VLLM_DIST_IDENT"] = f"{os.getpid()}-{next(_numbers)}"
    # Engines that share experts meet there.
    os.environ["VLLM_DP_MASTER_PORT"] = str(free_port())
    meeting = scratch / "meeting"
    meeting.unlink(missing_ok=True)
    for rank in range(layout.world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(folder, layout, rank, fills, then, meeting, sender), daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    answers = [_answer_of(receiver, deadline) for _, receiver in ranks]
    for process, _ in ranks:
        # What a rank does after its answer is no part of the test; one that hangs there is ended.
        process.join(END_SECONDS)
        process.kill()
        process.join()
    failures = [answer for answer in answers if isinstance(answer, str)]
    assert not failures, failures[0]
    return answers


def _answer_of(receiver: Any, deadline: float) -> Any:
    try:
        if not receiver.poll(max(0, deadline - time.monotonic())):
            return f"a rank gave no answer within {TIMEOUT_SECONDS} seconds"
        return receiver.recv()
    except EOFError:
        return "a rank ended without an answer"


def _run(
    folder: Path, layout: Layout, rank: int, fills: list[Fill], then: Then | None, meeting: Path, sender: Any
) -> None:
    try:
        sender.send(_load_all(folder, layout, rank, fills, then, meeting))
    except BaseException:
        sender.send(traceback.format_exc())
    sender.close()


def _load_all(
    folder: Path, layout: Layout, rank: int, fills: list[Fill], then: Then | None, meeting: Path
) -> list[Loaded]:
    import torch
    from vllm.config import LoadConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # Looks at the class of the model in a fresh interpreter, for which vLLM has to be imported once more.
    registry._run_in_subprocess = lambda function: function()
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None
    # Memory that nobody fills is the same in both models then.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if layout.dp > 1:
        number = str(rank // layout.engine_size)
        os.environ.update(VLLM_DP_SIZE=str(layout.dp), VLLM_DP_RANK=number, VLLM_DP_RANK_LOCAL=number)
    rank %= layout.engine_size
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=2,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        enable_expert_parallel=layout.ep,
        distributed_executor_backend="mp" if layout.engine_size > 1 else "uni",
        **layout.arguments,
    ).create_engine_config()
    config.parallel_config.rank = rank
    answers: list[Loaded] = []
    with set_current_vllm_config(config):
        init_distributed_environment(layout.engine_size, rank, f"file://{meeting}", rank, backend="gloo")
        ensure_model_parallel_initialized(layout.tp, layout.pp)
        for fill in fills:
            # Layers register themselves by name, and only one of each name may be there.
            config.compilation_config.static_forward_context.clear()
            answers.append(_load(config, fill, then, LoadConfig(load_format="safetensors")))
    return answers


def _load(config: Any, fill: Fill, then: Then | None, load_config: Any) -> Loaded:
    from vllm.model_executor.model_loader import BaseModelLoader

    loaded = Loaded({}, {})

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            loaded.said = fill(model, model_config)
            loaded.before = hashes_of(model)

    model = Loader(load_config).load_model(config, config.model_config)
    loaded.after = hashes_of(model)
    if then is not None:
        loaded.later = then(config, model)
    return loaded


def hashes_of(model: Any) -> dict[str, str]:
    """A hash of dtype, shape, strides and elements of every parameter, buffer and other tensor of the model's modules."""
    import torch

    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # Not loaded: constants that tracing leaves in the first model of a process, and what answers left in the KV cache.
            is_loaded = name != "kv_cache" and not name.startswith("_tensor_constant")
            if isinstance(value, torch.Tensor) and is_loaded:
                tensors[f"{path}.{name}"] = value
    return {name: hash_of(tensor) for name, tensor in tensors.items()}


def hash_of(tensor: Any) -> str:
    """A hash of dtype, shape, strides and elements."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}".encode())
    if not tensor.is_meta:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def stock(model: Any, model_config: Any, load_format: str = "safetensors") -> None:
    """Fills the model as that format of vLLM's own does."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import DefaultModelLoader

    DefaultModelLoader(LoadConfig(load_format=load_format, use_tqdm_on_load=False)).load_weights(model, model_config)
