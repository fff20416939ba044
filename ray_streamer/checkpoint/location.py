"""Which folder does a checkpoint URI mean, and which of its files?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from ray_streamer.storage.uri import FILE_NAMES

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """A folder to open storage on, and what of it was asked for.

    Attributes:
        folder_uri: The folder, bucket prefix or memory storage that holds the files.
        selection: Name of one `.safetensors` file or of one index json in the folder; None = find out what is there.
    """

    folder_uri: str
    selection: str | None = None


def locate(uri: str) -> CheckpointLocation:
    """Split a URI that ends in one `.safetensors` file or index json from its folder; any other URI is a folder.

    >>> locate("s3://bucket/llama/model.safetensors")
    CheckpointLocation(folder_uri='s3://bucket/llama', selection='model.safetensors')
    >>> locate("/models/llama")
    CheckpointLocation(folder_uri='/models/llama', selection=None)
    """
    scheme, separator, rest = uri.rpartition("://")
    folder, slash, name = rest.rpartition("/")
    names_a_file = name.endswith(FILE_NAMES)
    # In scheme://name the first component is a bucket or a memory storage, whatever it ends in.
    is_root = bool(separator) and not slash
    if not names_a_file or is_root:
        return CheckpointLocation(uri)
    if not folder:
        folder = "/" if slash else "."
    if scheme.lower() in ("http", "https"):
        name = unquote(name)
    return CheckpointLocation(f"{scheme}{separator}{folder}", name)


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a model's id on the Hugging Face Hub, ORG/MODEL; a relative path may have it, too."""
    return _HUB_ID.fullmatch(name) is not None
