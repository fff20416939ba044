"""What do the small JSON files beside the weights say? config.json, adapter_config.json and index files, read whole, of bounded size."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.foreign import foreign_format
from ray_streamer.checkpoint.header import MAX_HEADER_BYTES
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_lenient
from ray_streamer.errors import AccessError, CheckpointError, CredentialsError, ObjectMissingError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.units import exact_bytes
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from ray_streamer.storage.base import ObjectInfo, Storage

CONFIG_NAME = "config.json"
NO_LISTING = (
    "is not allowed to be read, nor may its folder be listed, so it may as well not exist (for S3: s3:ListBucket)"
)
"""What a warning says of a file that the store refuses, where it would refuse a missing one as well."""

_MAX_CONFIG_BYTES = 16 << 20
_HEAD_BYTES = 16 << 20

_logger = logging.getLogger(__name__)


def read_config(storage: Storage) -> dict[str, Any] | None:
    """A folder's config.json; None where there is none.

    Raises:
        CheckpointError: It is no JSON object.
        StorageError: Storage failed.
    """
    return read_json_config(storage, CONFIG_NAME)


def read_json_config(storage: Storage, name: str) -> dict[str, Any] | None:
    """The same for another file of this kind."""
    try:
        data = read_json_file(storage, name, max_bytes=_MAX_CONFIG_BYTES)
    except ObjectMissingError:
        return None
    except CredentialsError:
        # A listing would look for them again, for as long.
        raise
    except AccessError:
        if may_list(storage):
            raise
        _logger.warning("%s %s; going on without", printable(full_name(storage, name)), NO_LISTING)
        return None
    try:
        return parse_lenient(data)
    except MalformedJsonError as error:
        said = foreign_format(data) or f"{error}; fetch it again"
        raise CheckpointError(f"{full_name(storage, name)} {said}") from None


def read_json_file(storage: Storage, name: str, *, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """The whole file, in one request unless it is long.

    Raises:
        CheckpointError: It has more than `max_bytes`.
        StorageError: Storage failed; `ObjectMissingError` where there is none.
    """
    head, info = storage.read_head(name, _HEAD_BYTES)
    if info.size_bytes > max_bytes:
        raise CheckpointError(
            f"{full_name(storage, name)} has {exact_bytes(info.size_bytes)}, above the cap of {exact_bytes(max_bytes)}"
        )
    return read_up_to(storage, name, info.size_bytes, head, info)


def read_up_to(storage: Storage, path: str, stop: int, head: bytes, info: ObjectInfo) -> bytes:
    """`head`, continued to byte `stop` of the file when it ends before."""
    if len(head) >= stop:
        return head
    rest = bytearray(stop - len(head))
    storage.read_into(path, Extent(len(head), stop), memoryview(rest), etag=info.etag)
    return head + rest


def full_name(storage: Storage, path: str) -> str:
    """What messages call a file of the folder."""
    return f"{storage.uri.rstrip('/')}/{path}"


def may_list(storage: Storage) -> bool:
    """Whether the folder may be listed; where it may, a store says of each file whether it exists.

    Raises:
        CredentialsError: There are no credentials to ask with.
        StorageError: Storage failed.
    """
    try:
        storage.list()
    except CredentialsError:
        raise
    except AccessError:
        return False
    return True


def names_if_listed(storage: Storage) -> list[str]:
    """The folder's files, for messages; none where it cannot be listed."""
    try:
        return storage.list()
    except StorageError:
        return []
