"""In which store is each path, and under which name? Paths of one call may lie in several folders and buckets.

A store is opened at its root, so that one is enough for all files of a bucket or of the local filesystem.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.compat.runai.errors import RunaiStreamerInvalidInputException
from ray_streamer.storage import UriLike, absolute_uri, num_root_folders, scheme_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class StorePaths(NamedTuple):
    """Neighbours among the paths of a call that one store has.

    Attributes:
        root: Uri of the store: "/", or scheme and bucket.
        first: Position of the first one among all paths.
        paths: Relative to the root.
    """

    root: str
    first: int
    paths: tuple[str, ...]


def stores_of(paths: Sequence[UriLike]) -> list[StorePaths]:
    """The stores of `paths`, in their order.

    Raises:
        RunaiStreamerInvalidInputException: Paths are of several kinds of stores.
        SettingsError: A path means no store that is known here.
    """
    split = [_split(absolute_uri(path)) for path in paths]
    schemes = {scheme_of(root) for root, _ in split}
    if len(schemes) > 1:
        raise RunaiStreamerInvalidInputException(
            f"paths of one call are of one kind of store, got {', '.join(sorted(schemes))}; stream one kind after the other"
        )
    found: list[StorePaths] = []
    for root, some in groupby(split, key=lambda place: place[0]):
        first = sum(len(store.paths) for store in found)
        found.append(StorePaths(root, first, tuple(path for _, path in some)))
    return found


def _split(uri: str) -> tuple[str, str]:
    """The root of the store, and the path below it.

    >>> _split("s3://bucket/llama/a.safetensors"), _split("/models/a.safetensors")
    (('s3://bucket', 'llama/a.safetensors'), ('/', 'models/a.safetensors'))
    >>> _split("hf://org/llama@v1/a.safetensors")
    ('hf://org/llama@v1', 'a.safetensors')
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "/", uri.strip("/")
    folders = rest.split("/")
    num_of_root = 1 + num_root_folders(uri, scheme_of(uri))
    return f"{scheme}://{'/'.join(folders[:num_of_root])}", "/".join(folders[num_of_root:]).strip("/")
