"""How do bytes come from this URI? One `Storage` per folder or prefix; backends are imported when first used."""

from __future__ import annotations

import re

from ray_streamer.errors import SettingsError
from ray_streamer.storage.base import ObjectInfo, Storage, StorageSettings

__all__ = ["ObjectInfo", "Storage", "StorageSettings", "open_storage"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_storage(uri: str, settings: StorageSettings) -> Storage:
    """The storage of a folder or prefix: `/path`, `file:///path`, `s3://bucket/prefix`, `memory://name`, or what pyarrow opens.

    Opens nothing yet: what is wrong with the place itself shows at the first read. The caller closes it.

    Raises:
        SettingsError: No backend knows this uri.
    """
    match = _SCHEME.match(uri)
    scheme = match.group(1).lower() if match else "file"
    if scheme == "file":
        from ray_streamer.storage.posix import PosixStorage

        return PosixStorage(uri, settings)
    if scheme == "s3":
        from ray_streamer.storage.s3 import S3Storage

        return S3Storage(uri, settings)
    if scheme == "memory":
        from ray_streamer.storage.memory import MemoryStorage

        return MemoryStorage(uri, settings)
    if scheme in ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"):
        from ray_streamer.storage.arrow import open_arrow

        return open_arrow(uri, settings)
    raise SettingsError(
        f"no storage for {uri}: scheme {scheme}:// is not known; give a path, file:///path, s3://bucket/prefix, "
        "gs://, abfss:// or hdfs://, or memory://name"
    )
