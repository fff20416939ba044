"""Is a checkpoint's own `lm_head` left out by mistake? A configuration that ties it to the embedding builds no head of its own.

vLLM looks into the weights' files to see whether there is another head, and finds none when `model` is a folder with a
configuration only. Then the head is in the checkpoint, no rank takes it, and the answers are wrong without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.errors import CheckpointError
from ray_streamer.integrations.captured_slices import read_tensors
from ray_streamer.integrations.vllm import internals
from ray_streamer.integrations.vllm.collective import gather, is_first

if TYPE_CHECKING:
    import torch.distributed as dist

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.integrations.captured_slices import CapturedSlices
    from ray_streamer.settings import Settings

_HEAD = "lm_head.weight"
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


def refuse_other_head(
    captured: CapturedSlices,
    model: Any,
    model_config: Any,
    uri: str,
    settings: Settings,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuses a checkpoint whose head differs from its embedding, is used, and was taken by no rank; every rank of the group calls it.

    Raises:
        CheckpointError: It does, on every rank.
    """
    index, report = captured.index, captured.report
    assert index is not None
    assert report is not None
    if not getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        # Every rank has the same configuration, so none of them asks the others.
        return
    unused: set[str] = set()
    if internals.uses_head(model, model_config):
        unused = {name for name in report.unused.names if name.endswith(_HEAD)}
    heads = set.intersection(*gather(unused, group))
    if not heads:
        return
    message: str | None = None
    if is_first(group):
        message = _difference(index, sorted(heads)[0], uri, settings)
    message = gather(message, group)[0]
    if message is not None:
        raise CheckpointError(message)


def _difference(index: CheckpointIndex, head: str, uri: str, settings: Settings) -> str | None:
    embeddings = [name for name in index.names if name.endswith(_EMBEDDINGS)]
    if len(embeddings) != 1:
        return None
    tensors = read_tensors(uri, settings, index, [head, embeddings[0]])
    first, second = (tensors[name].reshape(-1).view(torch.uint8) for name in (head, embeddings[0]))
    if torch.equal(first, second):
        return None
    return (
        f"{index.uri}: config.json says tie_word_embeddings, but {head} differs from {embeddings[0]}, so the model would answer with "
        "the wrong head. Give vLLM --hf-overrides '{\"tie_word_embeddings\": false}' (in Python: hf_overrides), or correct config.json"
    )
