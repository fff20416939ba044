"""How do commands written for Run:ai's streamer run through this package? By one variable, RAY_STREAMER_REPLACE_RUNAI=1.

    RAY_STREAMER_REPLACE_RUNAI=1 vllm serve s3://bucket/llama --tensor-parallel-size 8

1. Load format `runai_streamer` is this package's. vLLM itself chooses that format for a model at s3://, gs:// or az://.
2. vLLM asks its `ObjectStorageModel` for a local folder with config and tokenizer. It gets this node's cache of them.

runai-model-streamer need not be installed. Load format `runai_streamer_sharded` stays vLLM's own.
"""

from __future__ import annotations

from ray_streamer.integrations.vllm import internals
from ray_streamer.integrations.vllm.loader import RayStreamerLoader
from ray_streamer.integrations.vllm.model_files import CachedModelFiles
from ray_streamer.settings import REPLACE_RUNAI

logger = internals.logger_of(__name__)


def answer_for_runai() -> None:
    """Puts this package in the place of Run:ai's streamer, in this process; says so once.

    Raises:
        SettingsError: This vLLM lacks what is to be replaced.
    """
    if internals.replace_runai(RayStreamerLoader, CachedModelFiles):
        logger.info(
            "%s is on: load format runai_streamer, and models at s3://, gs:// and az://, load through ray_streamer.",
            REPLACE_RUNAI,
        )
