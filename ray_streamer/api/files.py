"""Which files are at a uri, and how do they come to a folder here? For config, tokenizer and the like, without any tensor."""

from __future__ import annotations

import re
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.checkpoint import locate, shard_paths
from ray_streamer.checkpoint.folder_hints import refuse_missing_folder
from ray_streamer.errors import AccessError, CheckpointError, CredentialsError, ObjectMissingError
from ray_streamer.files import ENGINE_FILES, Selection, cached_files, listed_or_known, pull_files
from ray_streamer.files.pull import identities
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.settings import Settings
from ray_streamer.storage import absolute_folder, open_storage
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from ray_streamer.storage import Storage, UrisLike


_GLOB = re.compile(r"[*?\[]")


def ls(uri: UrisLike, *, settings: Settings | None = None) -> list[str]:
    """Every file at a uri, and in the folders below it.

    A folder that cannot be listed, as those of web servers, is asked for the files of the model and for usual names of others, such
    as config.json; a warning says so.

    Args:
        uri: A folder or prefix, or one file; as in `load_sharded`.
        settings: Every knob; from the environment when unset.

    Returns:
        Paths relative to the uri's folder, sorted.

    Raises:
        SettingsError: The uri cannot mean anything.
        StorageError: There is nothing, or it may not be listed and has no file of a name that was asked for.
    """
    settings = Settings.of_call(settings)
    with _opened(uri, settings) as (storage, paths):
        identities(storage, paths, concurrency=settings.concurrency)
        return paths or _everything(storage, concurrency=settings.concurrency)


def pull(
    uri: UrisLike,
    dst: str | os.PathLike[str],
    *,
    allow: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    settings: Settings | None = None,
) -> list[Path]:
    """Copies files from a uri into a folder. Each file is complete or absent: it is renamed when it has its last byte.

    Args:
        uri: A folder or prefix, or one file; as in `load_sharded`.
        dst: The folder; made if need be. Files that are there already are replaced.
        allow: Globs of paths to copy, such as "*.json"; every file when unset. `*` also stands for "/". Whole names are asked for
            where a folder cannot be listed; else as `ls`.
        ignore: Globs of paths to leave out.
        settings: Every knob; from the environment when unset.

    Returns:
        Where the files are now, sorted by path.

    Raises:
        SettingsError: An argument cannot mean anything.
        ObjectMissingError: No file is there, or none matches.
        CheckpointError: A name in the store could lead out of `dst`; nothing was copied then.
        StorageError: A file could not be read or written; files that were complete stay.
    """
    selection, folder = Selection.from_globs(allow, ignore), Path(absolute_folder(dst))
    settings = Settings.of_call(settings)
    with _opened(uri, settings) as (storage, paths):
        chosen = selection.of(paths or _everything(storage, concurrency=settings.concurrency, names=selection.allow))
        if not chosen:
            left_out = f", less {listed(list(map(shown, selection.ignore)))}" if selection.ignore else ""
            meant = listed(list(map(shown, selection.allow))) or "'*'"
            raise ObjectMissingError(f"{storage.uri}: no file matches {meant}{left_out}")
        return pull_files(storage, chosen, folder, concurrency=settings.concurrency)


def cached(uri: UrisLike, *, selection: Selection = ENGINE_FILES, settings: Settings | None = None) -> Path:
    """A folder of this node with the checkpoint's config, tokenizer and code, as they are at the uri now.

    Copied once per node and version, however many processes ask; a local folder is its own copy.

    Args:
        uri: A folder or prefix; as in `load_sharded`.
        selection: Which files.
        settings: Every knob; from the environment when unset. `cache_dir` says where.

    Raises:
        SettingsError: The uri cannot mean anything.
        ObjectMissingError: There is no such folder.
        StorageError: A file could not be read or written.
    """
    settings = Settings.of_call(settings)
    with _opened(uri, settings) as (storage, _):
        if not storage.is_remote:
            refuse_missing_folder(storage)
            return Path(storage.uri)
        return cached_files(
            storage,
            cache=_cache_of(settings),
            timeout_seconds=settings.startup_timeout_seconds,
            selection=selection,
            concurrency=settings.concurrency,
        )


def is_in_cache(folder: Path, settings: Settings) -> bool:
    """Whether that is where `cached` puts its copies, on whatever node."""
    return folder.resolve().is_relative_to(_cache_of(settings).resolve())


def _cache_of(settings: Settings) -> Path:
    return Path(absolute_folder(settings.cache_dir))


@contextmanager
def _opened(uri: UrisLike, settings: Settings) -> Iterator[tuple[Storage, list[str]]]:
    """The storage of a uri, and the one file that the uri names, if it does."""
    named = NamedCheckpoint.of(uri, settings)
    location = locate(named.uri)
    with closing(open_storage(location.folder_uri, named.settings)) as storage:
        yield storage, [] if location.selection is None else [location.selection]


def _everything(storage: Storage, *, concurrency: int, names: Sequence[str] = ()) -> list[str]:
    """Every file; where the folder cannot be listed, those of the model, of usual names, and of `names` that are no globs."""

    def others() -> list[str]:
        try:
            shards = shard_paths(storage)
        except CredentialsError:
            raise
        except (CheckpointError, ObjectMissingError, AccessError):
            # No model is there, or none that can be loaded; other files may be.
            shards = []
        return [*shards, *(name for name in names if not _GLOB.search(name))]

    paths = listed_or_known(storage, concurrency=concurrency, others=others)
    if not paths:
        raise ObjectMissingError(f"{storage.uri}: nothing is there; check the path")
    return paths
