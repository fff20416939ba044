"""What is at a uri that is no folder with a checkpoint, and what should be given instead?

Asked only once a load has failed, so it may look around: at a file that was given for a folder, at the snapshots of a cache
folder, at folders below. On object stores only names of files tell.
"""

from __future__ import annotations

import os
import re
from itertools import islice
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.foreign import foreign_format
from ray_streamer.checkpoint.json_files import may_list, names_if_listed
from ray_streamer.checkpoint.location import may_be_hub_id
from ray_streamer.checkpoint.shard_files import (
    ADAPTER_CONFIG_NAME,
    CONSOLIDATED_NAME,
    OTHER_LAYOUT,
    SINGLE_NAME,
    SUFFIX,
    is_of_adapter,
)
from ray_streamer.errors import CheckpointError, ObjectMissingError, StorageError
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.storage.base import Storage

INDEX_NAME = "model.safetensors.index.json"
_WANTED = f"looked for {INDEX_NAME}, {SINGLE_NAME} and *{SUFFIX}"
_CHECK_PLACE = "check the path, or the bucket and prefix"
_CONVERT = "convert the checkpoint to safetensors first, or fetch a revision of it that has safetensors files"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".distcp")
"""How names of files end that hold weights in another format."""
_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_NUM_ENTRIES = 1000
_HEAD_BYTES = 64


def missing_folder(storage: Storage, error: ObjectMissingError) -> CheckpointError | ObjectMissingError:
    """The error to raise where there is no such folder.

    Raises:
        AccessError: It is a file that may not be read.
    """
    path = _local_folder(storage)
    if path is not None and os.path.isfile(path):
        head, _ = storage.read_head("", _HEAD_BYTES)
        what = foreign_format(head)
        return CheckpointError(
            f"{path} is a file whose name does not end in {SUFFIX}; "
            f"{f'it {what}' if what else 'give a folder, or rename it if it is a safetensors file'}"
        )
    return ObjectMissingError(f"{error}{_if_hub_id(storage)}; {_CHECK_PLACE}")


def refuse_missing_folder(storage: Storage) -> None:
    """Refuses a folder that does not exist, in the words of `missing_folder`.

    Raises:
        ObjectMissingError: There is none.
        CheckpointError: It is a file.
    """
    try:
        # One that may not be listed is there, and its files may be read all the same.
        may_list(storage)
    except ObjectMissingError as error:
        raise missing_folder(storage, error) from error


def missing_selection(storage: Storage, name: str, error: StorageError) -> StorageError | None:
    """The error to raise where one file was asked for and is not there, or is no file; None when there is none better."""
    path = storage.local_path(name)
    if path is not None and os.path.isdir(path):
        return StorageError(f"{path} is a folder, though its name ends like a file's; give it with a / at its end")
    if not isinstance(error, ObjectMissingError):
        return None
    if path is not None and os.path.islink(path):
        return ObjectMissingError(
            f"{path} is a link to {os.readlink(path)}, which does not exist, as links of a cache that was copied without its blobs; "
            "fetch the file again"
        )
    others = f"; there are {listed(others)}" if (others := _safetensors_names(storage)) else ""
    return ObjectMissingError(f"{storage.uri.rstrip('/')}/{name}: no such file{others}; check the path")


def nothing_to_open(storage: Storage, names: Sequence[str]) -> CheckpointError | ObjectMissingError:
    """The error to raise where a folder has no shard file of a model; `names` are those of its files."""
    uri = storage.uri
    if elsewhere := _elsewhere(storage, names):
        return CheckpointError(f"{uri} is {elsewhere}")
    if not names:
        return ObjectMissingError(f"{uri}: nothing is there; {_WANTED}; {_CHECK_PLACE}")
    return CheckpointError(f"{uri}: no safetensors checkpoint; {_WANTED}, found only {_found(names)}")


def _found(names: Sequence[str]) -> str:
    """What there is, and what to do about it."""
    consolidated = [name for name in names if name.startswith(OTHER_LAYOUT) and name.endswith(SUFFIX)]
    adapters = list(filter(is_of_adapter, names))
    others = [name for name in names if name.endswith(OTHER_FORMATS)]
    if consolidated:
        return f"{_listed(consolidated)}, whose tensors have Mistral's own names, so rules= must place them; {_joined(consolidated, names)}"
    if adapters:
        return (
            f"{_listed(adapters)}, the adapter (LoRA) of another model, without its {ADAPTER_CONFIG_NAME}; fetch that, too, or give the "
            f"uri of the {SUFFIX} file to load its tensors alone"
        )
    if others:
        return f"{_listed(others)}; {_CONVERT}"
    if INDEX_NAME.replace(SUFFIX, ".bin") in names:
        return f"{_listed(names)}; {_CONVERT}"
    return f"{_listed(names)}; is the checkpoint in another folder?"


def _joined(consolidated: Sequence[str], names: Sequence[str]) -> str:
    """How to open files of Mistral's own layout."""
    indices = [name for name in names if name.startswith(OTHER_LAYOUT) and name.endswith(".index.json")]
    if indices:
        return f"give the uri of {indices[0]} to open them"
    if len(consolidated) == 1:
        return "give the uri of this one file to open it"
    return f"write {CONSOLIDATED_NAME}.index.json, whose weight_map names the file of each tensor, and give its uri"


def _elsewhere(storage: Storage, names: Sequence[str]) -> str | None:
    """What kind of folder it is that has a checkpoint below it, and which one to give; None when it is none."""
    uri, folder = storage.uri.rstrip("/"), _local_folder(storage)
    below = sorted(_folders_in(folder)) if folder is not None else []
    if (revision := _main_revision(storage)) is not None:
        return f"a cache folder of the Hugging Face Hub: give {uri}/snapshots/{revision}, the revision that its refs/main names"
    if uri.rpartition("/")[2].startswith("models--") or ("snapshots" in below and "blobs" in below):
        found = sorted(_folders_in(f"{folder}/snapshots")) if folder is not None else []
        if found:
            return (
                f"a cache folder of the Hugging Face Hub: give {_one_of([f'{uri}/snapshots/{one}' for one in found])}"
            )
        return f"a cache folder of the Hugging Face Hub: give one of its snapshots, {uri}/snapshots/REVISION"
    if cached := [name for name in below if name.startswith("models--")]:
        return f"the cache of the Hugging Face Hub: give a snapshot of one model of it, such as {uri}/{cached[0]}/snapshots/REVISION"
    if "model_index.json" in names:
        return "a pipeline of several models: give the folder of one, such as its transformer/"
    if folder is not None and (found := [name for name in below if _has_safetensors(f"{folder}/{name}")]):
        return f"no checkpoint itself: give a folder below it, {_one_of([f'{uri}/{name}' for name in found])}"
    return None


def _main_revision(storage: Storage) -> str | None:
    """The revision that a cache folder's refs/main names."""
    try:
        head, info = storage.read_head("refs/main", _HEAD_BYTES)
        text = head.decode("ascii").strip() if info.size_bytes <= _HEAD_BYTES else ""
    except (StorageError, UnicodeDecodeError):
        return None
    return text if _REVISION.fullmatch(text) else None


def _if_hub_id(storage: Storage) -> str:
    path = _local_folder(storage)
    name = "" if path is None else os.path.relpath(path)
    if not may_be_hub_id(name) or os.path.isdir(name.partition("/")[0]):
        return ""
    return f"; did you mean hf://{name}, a model of the Hugging Face Hub?"


def _safetensors_names(storage: Storage) -> list[str]:
    return [shown(name) for name in names_if_listed(storage) if name.endswith((SUFFIX, ".index.json"))]


def _local_folder(storage: Storage) -> str | None:
    path = storage.local_path("")
    return None if path is None else path.rstrip("/") or "/"


def _folders_in(path: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            yield from [entry.name for entry in islice(entries, _NUM_ENTRIES) if entry.is_dir()]
    except OSError:
        return


def _has_safetensors(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return any(entry.name.endswith(SUFFIX) for entry in islice(entries, _NUM_ENTRIES))
    except OSError:
        return False


def _one_of(uris: Sequence[str]) -> str:
    return uris[0] if len(uris) == 1 else f"one of {listed(uris)}"


def _listed(names: Sequence[str]) -> str:
    return listed([shown(name)[1:-1] for name in names])
