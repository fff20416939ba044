"""Where are the small files of a checkpoint on this node? In one folder for each version of them, made once, whoever asks first.

    CACHE/files/<hash of the uri>/<hash of paths, sizes and ETags>/config.json, tokenizer.json, ...

A folder is filled under another name and renamed, so it is complete or absent. Processes of the node that ask at the same time
wait for the one that fills it: a file lock, which the kernel drops when its holder dies. Other versions are left alone: an
engine may run on them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from typing import TYPE_CHECKING

from ray_streamer.errors import ObjectMissingError
from ray_streamer.files.known import listed_or_known
from ray_streamer.files.locks import locked
from ray_streamer.files.pull import disk_errors_translated, identities, pull_files
from ray_streamer.files.selection import ENGINE_FILES, Selection

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.storage import ObjectInfo, Storage


def cached_files(
    storage: Storage,
    *,
    cache: Path,
    timeout_seconds: float,
    selection: Selection = ENGINE_FILES,
    concurrency: int,
) -> Path:
    """The folder that holds the selected files as they are in the storage now.

    Args:
        storage: Open on the checkpoint's folder or prefix.
        cache: This node's cache folder; made if need be, private to the user.
        timeout_seconds: How long another process of this node may take to fill the folder.
        selection: Which files.
        concurrency: Files at a time.

    Raises:
        ObjectMissingError: There is no such file.
        ObjectChangedError: A file was replaced between the look at its version and the copy.
        StorageError: A file could not be read or written, or another process did not come to an end.
    """
    paths = selection.of(listed_or_known(storage, concurrency=concurrency))
    if not paths:
        raise ObjectMissingError(f"{storage.uri}: no config or tokenizer files are there; check the path")
    found = identities(storage, paths, concurrency=concurrency)
    version = [[path, info.size_bytes, info.etag] for path, info in zip(paths, found, strict=True)]
    of_uri = cache / "files" / _digest(storage.uri)
    folder = of_uri / _digest(json.dumps(version))
    if folder.is_dir():
        return folder
    with disk_errors_translated(of_uri):
        of_uri.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(of_uri / "lock", what=of_uri, timeout_seconds=timeout_seconds):
        if not folder.is_dir():
            _fill(storage, paths, found, folder, concurrency=concurrency)
    return folder


def _fill(storage: Storage, paths: list[str], versions: list[ObjectInfo], folder: Path, *, concurrency: int) -> None:
    # Who holds the lock is alone: what another one left when it was killed is nobody's.
    for left in folder.parent.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        pull_files(storage, paths, temporary, versions=versions, concurrency=concurrency)
        with disk_errors_translated(folder):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
