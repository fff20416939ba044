"""Which model was an adapter (LoRA) made for? Its config.json says how the modules lie that the adapter sits on.

It may stand in the adapter's own folder. Else the adapter names its base model: a folder of this machine, or a model of the Hugging Face
Hub. Other uris are not followed: an adapter that came from elsewhere must not choose who is sent credentials.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.json_files import read_config
from ray_streamer.checkpoint.location import may_be_hub_id
from ray_streamer.checkpoint.open import ADAPTER_KEY
from ray_streamer.errors import RayStreamerError
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.storage.base import Storage

_logger = logging.getLogger(__name__)


def adapter_config_of(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What adapter_config.json says, of an adapter's config; None of any other."""
    return (config or {}).get(ADAPTER_KEY)


def with_base_config(index: CheckpointIndex, open_folder: Callable[[str], Storage]) -> CheckpointIndex:
    """An adapter's index, with the config of its base model; itself where it has one, or is no adapter's.

    Where that config cannot be read, the index stays as it is, and a warning says why.

    Args:
        index: Of the checkpoint.
        open_folder: Opens the storage at a uri; it is closed here.
    """
    adapter = adapter_config_of(index.config)
    if adapter is None or index.config is None or "model_type" in index.config:
        return index
    named = adapter.get("base_model_name_or_path")
    uri = base_uri(named, adapter.get("revision"))
    why = "it is neither a folder here nor a model of the Hub"
    if uri is not None:
        try:
            with closing(open_folder(uri)) as storage:
                base = read_config(storage)
        except (RayStreamerError, OSError) as error:
            base, why = None, str(error)
        else:
            why = "there is no config.json"
        if base is not None:
            return replace(index, config={**base, ADAPTER_KEY: adapter})
    _logger.warning("%s: the config of its base model %s cannot be read: %s", index.uri, printable(repr(named)), why)
    return index


def base_uri(named: object, revision: object = None) -> str | None:
    """The uri of a base model by the name that an adapter gives it; None where it is none that is followed.

    >>> base_uri("meta-llama/Llama-3.1-8B"), base_uri("s3://bucket/model")
    ('hf://meta-llama/Llama-3.1-8B', None)
    """
    if not isinstance(named, str) or not named or "://" in named or "\0" in named:
        return None
    path = os.path.abspath(os.path.expanduser(named))
    if os.path.isdir(path):
        return path
    if not may_be_hub_id(named):
        return None
    return f"hf://{named}@{revision}" if isinstance(revision, str) and revision else f"hf://{named}"
