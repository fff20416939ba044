"""Which files of an engine does a folder have that nobody may list, as on a web server? Those of the usual names that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.errors import AccessError, ObjectMissingError
from ray_streamer.files.pull import of_each

if TYPE_CHECKING:
    from ray_streamer.storage import Storage

USUAL_NAMES = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "hf_quant_config.json",
        "quantize_config.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json", "params.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
"""What transformers, vLLM and Mistral call the files that they look for beside weights; code of a model's own is not among them."""


def listed_or_known(storage: Storage, *, concurrency: int) -> list[str]:
    """Every file of a folder, or those of `USUAL_NAMES` where it cannot be listed; the latter costs one request for each name.

    Raises:
        ObjectMissingError: There is no such folder.
        StorageError: Storage failed; see `Storage`.
    """
    try:
        return storage.list(recursive=True)
    except AccessError:
        found = of_each(USUAL_NAMES, lambda name: _is_there(storage, name), concurrency=concurrency)
        if not any(found):
            raise
        return [name for name, is_there in zip(USUAL_NAMES, found, strict=True) if is_there]


def _is_there(storage: Storage, name: str) -> bool:
    try:
        storage.size_and_etag(name)
    except (ObjectMissingError, AccessError):
        # A store that refuses lists may hide what is not there behind a refusal, too.
        return False
    return True
