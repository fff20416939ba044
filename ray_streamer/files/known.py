"""Which files does a folder have that nobody may list, as on a web server? Those of the names that one can think of, if they are there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_streamer.errors import AccessError, CredentialsError, ObjectMissingError
from ray_streamer.files.pull import of_each
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_streamer.storage import Storage

_logger = logging.getLogger(__name__)

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

_HEAD_BYTES = 64


def listed_or_known(storage: Storage, *, concurrency: int, others: Callable[[], Sequence[str]] = tuple) -> list[str]:
    """Every file of a folder, or where it cannot be listed those that are there of `USUAL_NAMES` and others.

    Each name costs a request then, and a warning says so.

    Args:
        storage: Open on the folder.
        concurrency: Requests at a time.
        others: Further names to ask for; called where the folder cannot be listed.

    Raises:
        ObjectMissingError: There is no such folder.
        StorageError: Storage failed; see `Storage`.
    """
    try:
        return storage.list(recursive=True)
    except CredentialsError:
        raise
    except AccessError:
        names = sorted({*USUAL_NAMES, *others()})
        found = of_each(names, lambda name: _is_shown(storage, name), concurrency=concurrency)
        if not any(found):
            raise
        _logger.warning(
            "%s cannot be listed; it was asked for %d names, and has %d of them; there may be other files",
            printable(storage.uri),
            len(names),
            sum(found),
        )
        return [name for name, is_there in zip(names, found, strict=True) if is_there]


def _is_shown(storage: Storage, name: str) -> bool:
    """Whether the file is there. Some web servers answer with a page, and no error, where it is not."""
    try:
        head, _ = storage.read_head(name, _HEAD_BYTES)
    except ObjectMissingError:
        return False
    except CredentialsError:
        raise
    except AccessError:
        # A store that refuses lists may hide what is not there behind a refusal, too.
        return False
    return not head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
