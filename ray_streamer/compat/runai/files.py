"""Which safetensors files are in a folder, and how do files of an object store come to a local folder?"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ray_streamer.api.files import ls, pull
from ray_streamer.compat.runai.credentials import settings_for
from ray_streamer.compat.runai.errors import translated
from ray_streamer.errors import ObjectMissingError, SettingsError
from ray_streamer.files.locks import locked
from ray_streamer.files.pull import disk_errors_translated
from ray_streamer.storage import absolute_folder, absolute_uri, open_storage, scheme_of

if TYPE_CHECKING:
    from types import TracebackType

    from ray_streamer.compat.runai.credentials import S3Credentials

_COMPLETE = ".runai_complete"
"""Stands in a folder that has all its files; folders that Run:ai's streamer completed count, too."""


def list_safetensors(path: str, s3_credentials: S3Credentials | None = None) -> list[str]:
    """The safetensors files in a folder, without those of folders in it; none where a local folder does not exist.

    Args:
        path: The folder or prefix.
        s3_credentials: For object stores; as boto3 finds them when unset.

    Raises:
        SettingsError: It is no path or uri.
        FileAccessError: The bucket does not exist, or may not be listed.
    """
    path = absolute_uri(path)
    if scheme_of(path) == "file" and not os.path.isdir(path):
        return []
    with translated(), closing(open_storage(path, settings_for(s3_credentials))) as storage:
        names = storage.list()
    folder = path.rstrip("/")
    return [f"{folder}/{name}" for name in names if name.endswith(".safetensors")]


def pull_files(
    model_path: str,
    dst: str,
    allow_pattern: list[str] | None = None,
    ignore_pattern: list[str] | None = None,
    s3_credentials: S3Credentials | None = None,
) -> None:
    """Copies files of an object store into a local folder; nothing where no file matches.

    Args:
        model_path: The folder or prefix.
        dst: The local folder; made if need be.
        allow_pattern: Globs of files to copy; every file when unset.
        ignore_pattern: Globs of files to leave out.
        s3_credentials: As boto3 finds them when unset.

    Raises:
        NotImplementedError: `model_path` is a local folder: its files are there already.
        FileAccessError: A file could not be read or written.
        CorruptedFileError: A name in the store could lead out of `dst`.
    """
    if scheme_of(absolute_uri(model_path)) == "file":
        raise NotImplementedError(
            f"{model_path} is a local folder, from which pull_files copies nothing; use the folder itself, or ray_streamer.pull"
        )
    settings = settings_for(s3_credentials)
    with translated():
        try:
            # Asked by itself: of a bucket that is not there, nothing is copied silently.
            ls(model_path, settings=settings)
            pull(model_path, dst, allow=allow_pattern, ignore=ignore_pattern, settings=settings)
        except ObjectMissingError:
            return


class ObjectStorageModel:
    """A local folder for the files of a model in an object store, which one process of the node fills.

    with ObjectStorageModel("s3://bucket/llama", "/tmp/llama") as model:
        model.pull_files(allow_pattern=["*.json"])
    engine = start(model.dir)

    Inside the `with` block other processes of this node wait. One that left it without an error has completed the folder: nothing
    is copied into it any more.

    Args:
        model_path: The folder or prefix.
        dst: The local folder.
        s3_credentials: As boto3 finds them when unset.

    Attributes:
        dir: The local folder, absolute.

    Raises:
        SettingsError: `model_path` is in no object store, or `dst` no local folder.
    """

    def __init__(self, model_path: str, dst: str, s3_credentials: S3Credentials | None = None) -> None:
        if scheme_of(absolute_uri(model_path)) == "file":
            raise SettingsError(
                f"{model_path} is in no object store: give a uri such as s3://bucket/model, or use the folder itself"
            )
        self.dir = absolute_folder(dst)
        self._model_path, self._credentials = model_path, s3_credentials
        self._is_complete = False
        self._owned = ExitStack()

    def pull_files(self, allow_pattern: list[str] | None = None, ignore_pattern: list[str] | None = None) -> None:
        """Copies files, as `pull_files` does; nothing where the folder is complete."""
        if not self._is_complete:
            pull_files(self._model_path, self.dir, allow_pattern, ignore_pattern, self._credentials)

    def __enter__(self) -> Self:
        settings, folder = settings_for(self._credentials), Path(self.dir)
        with translated(), disk_errors_translated(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder.parent / f"{folder.name}.lock"
            self._owned.enter_context(locked(lock, what=folder, timeout_seconds=settings.startup_timeout_seconds))
        self._is_complete = (folder / _COMPLETE).exists()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        with self._owned:
            if exc_type is None:
                (Path(self.dir) / _COMPLETE).touch()
        return False
