"""How do bytes come from this URI? One `Storage` per folder or prefix; backends are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ray_streamer.storage.base import ObjectInfo, Storage, StorageSettings, is_there
from ray_streamer.storage.signed import UrisLike, split_signature
from ray_streamer.storage.stores import num_root_folders, store_kind
from ray_streamer.storage.uri import UriLike, absolute_folder, absolute_uri, scheme_of

if TYPE_CHECKING:
    from ray_streamer.storage.object_store import ObjectStore

__all__ = [
    "ObjectInfo",
    "Storage",
    "StorageSettings",
    "UriLike",
    "UrisLike",
    "absolute_folder",
    "absolute_uri",
    "is_there",
    "num_root_folders",
    "open_storage",
    "scheme_of",
    "split_signature",
]


def open_storage(uri: UriLike, settings: StorageSettings) -> Storage:
    """The storage of a folder or prefix: a local path, `memory://name`, a place in a store of `stores`, or what pyarrow opens.

    Opens nothing yet: what is wrong with the place itself shows at the first read. The caller closes it.

    Raises:
        SettingsError: No backend knows this uri, or it has credentials in it.
    """
    uri = absolute_uri(uri)
    scheme = scheme_of(uri)
    if scheme == "file":
        from ray_streamer.storage.posix import PosixStorage

        return PosixStorage(uri, settings)
    if scheme == "memory":
        from ray_streamer.storage.memory import MemoryStorage

        return MemoryStorage(uri, settings)
    kind = store_kind(uri, scheme)
    if kind is not None:
        from ray_streamer.storage.object_storage import ObjectStorage

        store: ObjectStore = import_module(kind.module).open_store(uri, settings)
        return ObjectStorage(uri, settings, store)
    from ray_streamer.storage.arrow import open_arrow

    return open_arrow(uri, settings)
