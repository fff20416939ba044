"""What must a place that holds checkpoints be able to do?

A storage reads files of one folder or prefix, its `uri`. Paths are relative to it, with "/" between folders. The
docstrings of `Storage` are the contract; one test suite holds every backend to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from ray_streamer.errors import AccessError, CredentialsError, ObjectMissingError, StorageError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from ray_streamer.extent import Extent


OnFirstByte = Callable[[], None]
"""Told that the bytes of an extent begin to come."""


def ignore() -> None:
    """Takes no note of the first byte."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The identity of one file: reads that are given `etag` fail when the file is another one by then.

    Attributes:
        size_bytes: Length of the file.
        etag: Opaque to everyone but the storage that made it, which also says what of it is compared where.
    """

    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageStatistics:
    """What it took to get the bytes so far; all but the last are zero where there is no network.

    Attributes:
        num_connections: Connections that were opened.
        num_retries: Requests that were sent again after a passing fault.
        num_throttled: Answers that asked to slow down.
        num_hedges: Second requests that were sent because an answer was late.
        num_cuts: Bodies that were late, and went on over another connection at the byte that they had reached.
        wasted_bytes: Bytes that came and were thrown away.
        scratch_bytes: Memory that reads used besides the buffers that they filled.
    """

    num_connections: int = 0
    num_retries: int = 0
    num_throttled: int = 0
    num_hedges: int = 0
    num_cuts: int = 0
    wasted_bytes: int = 0
    scratch_bytes: int = 0


class Incident(NamedTuple):
    """One thing that went wrong or came late, and was made good; `StorageStatistics` counts them.

    Attributes:
        kind: "retry", "throttled", "hedge", "cut"; "held": a request waited, since the store had asked to slow down; or "slow
            address": a body came from an address that is slower than the store's others.
        seconds: When, by the monotonic clock of this machine (`time.perf_counter`); of what lost time, the end.
        path: The file that was read; empty where that is not told.
        offset: First byte in the file that was still missing.
        lost_seconds: Until then nothing came for so long: the attempt in vain, and the wait for the next one. Of a slow address, how
            much longer the body took than others.
        address: Of the server; empty where that is not told.
    """

    kind: str
    seconds: float
    path: str = ""
    offset: int = 0
    lost_seconds: float = 0.0
    address: str = ""


class StorageSettings(Protocol):
    """The settings that backends use; see `ray_streamer.settings.Settings` for what each one means."""

    direct_io: Literal["auto", "on", "off"]
    page_cache: Literal["auto", "on", "off"]
    concurrency: int
    connect_timeout_seconds: float
    first_byte_timeout_seconds: float
    stall_timeout_seconds: float
    list_timeout_seconds: float
    retry_deadline_seconds: float
    hedge_percent: float
    s3_endpoint_url: str | None
    s3_region: str | None
    s3_profile: str | None
    s3_addressing: Literal["auto", "path", "virtual"]
    s3_unsigned: bool
    s3_ca_bundle: str | None
    s3_requester_pays: bool
    credentials_timeout_seconds: float
    s3_access_key_id: SecretStr | None
    s3_secret_access_key: SecretStr | None
    s3_session_token: SecretStr | None
    hf_token: SecretStr | None
    azure_unsigned: bool
    gs_unsigned: bool
    gs_user_project: str | None
    http_query: SecretStr | None
    http_signed: SecretStr | None
    http_authorization: SecretStr | None

    @property
    def max_bandwidth(self) -> int | None:
        """Bytes per second of the node; settings may be of a narrower type."""
        ...


class Storage(Protocol):
    """Files of one folder or prefix. Every method may be called from many threads at once.

    All methods raise `ObjectMissingError`, `AccessError` and `StorageError` for what their names say.

    Attributes:
        uri: The folder or prefix; an absolute path for a local one, else as given.
        is_remote: Whether each request costs a round trip to an object store.
        is_disk: Whether the files lie on disks of this machine, which all of its ranks read.
    """

    uri: str
    is_remote: bool
    is_disk: bool

    def size_and_etag(self, path: str) -> ObjectInfo:
        """Size and identity of a file, without reading it."""
        ...

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """The first bytes of a file, at most `max_bytes`, and the identity of what was read, in one request.

        Its etag may say more of the same version than that of `size_and_etag`, which reads nothing.
        """
        ...

    def read_into(
        self, path: str, extent: Extent, buffer: memoryview, *, etag: str, on_first_byte: OnFirstByte = ignore
    ) -> None:
        """Fill `buffer` with the bytes of `extent`; an empty extent touches nothing, not even the storage.

        The caller owns the buffer, lends it until the call returns or raises, and may reuse it then. Its length must be
        `extent.num_bytes`. After an error its content is undefined; bytes outside of it are never written.

        `on_first_byte` is called in the calling thread, once for an extent that is not empty: over HTTP when the response
        headers of the first successful answer are there, elsewhere when the storage returns from the call that brings all.

        Raises:
            ShortReadError: The file ends before the extent does.
            ObjectChangedError: The file is not the one with `etag`.
            ThrottledError: The store asked to slow down until the retry deadline passed.
        """
        ...

    def is_resident(self, path: str) -> bool:
        """Whether every rank had better take its own part, from a `view` or by reads; cheap, so it may be asked for every file."""
        ...

    def view(self, path: str, *, etag: str) -> memoryview:
        """The whole file as read-only memory, whether it is resident or not; belongs to the storage, valid until `close`.

        Whoever copies from it asks `check_unchanged` afterwards: the memory shows what is written to the file later. It
        asks before each copy, too: a file that is cut short kills whoever touches the missing part of its memory (SIGBUS).

        Raises:
            ObjectChangedError: The file is not the one with `etag`.
            StorageError: This storage cannot lend a file as memory; then `is_resident` says no.
        """
        ...

    def check_unchanged(self, path: str, *, etag: str) -> None:
        """For whoever read the file past `read_into`, by `view` or `local_path`: whether it still is the one with `etag`.

        Raises:
            ObjectChangedError: It is another one by now, or was written to.
        """
        ...

    def limit_scratch(self, num_bytes: int) -> int:
        """Lets reads use so much memory at most besides the buffers that they fill; how much they will use. Called before they begin."""
        ...

    def local_path(self, path: str) -> str | None:
        """Where the operating system finds the file, for those who read it themselves; None where it is no local file.

        They ask `check_unchanged` afterwards whether it is the file that the index saw.
        """
        ...

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """Paths that begin with `prefix` and have no further "/", files only, sorted; with `recursive`, also those that have.

        A folder that does not exist is an empty list where the store has no folders, else `ObjectMissingError`.
        """
        ...

    def statistics(self) -> StorageStatistics:
        """What it took so far; may be asked after `close`, too."""
        ...

    def incidents(self) -> tuple[Incident, ...]:
        """When it went wrong so far, the first few thousand times; may be asked after `close`, too."""
        ...

    def close(self) -> None:
        """Give back descriptors, mappings and connections. May be called twice.

        Reads in flight finish, or end with `StorageError` where they would wait for a network; later ones raise it.
        """
        ...


class RemoteStorage:
    """What all backends have in common whose files are on somebody else's machine."""

    uri: str
    is_remote = True
    is_disk = False

    def is_resident(self, path: str) -> bool:
        """See `Storage`; never here."""
        return False

    def view(self, path: str, *, etag: str) -> memoryview:
        """See `Storage`; never here."""
        raise StorageError(f"{self._name(path)} is in a remote store, which lends no memory")

    def check_unchanged(self, path: str, *, etag: str) -> None:
        """See `Storage`; nobody else reads a remote file."""
        raise StorageError(f"{self._name(path)} is in a remote store, which nobody reads past this storage")

    def limit_scratch(self, num_bytes: int) -> int:
        """See `Storage`; none."""
        return 0

    def local_path(self, path: str) -> str | None:
        """See `Storage`; remote files are nowhere here."""
        return None

    def _name(self, path: str) -> str:
        return f"{self.uri.rstrip('/')}/{path}"


def is_seen(storage: Storage, path: str) -> bool:
    """As `is_there`, but False where the store refuses to say: so it answers for a file that is not there, where folders may not be listed.

    Raises:
        CredentialsError: The store knows nobody of these credentials.
        StorageError: Storage failed.
    """
    try:
        return is_there(storage, path)
    except CredentialsError:
        raise
    except AccessError:
        return False


def is_there(storage: Storage, path: str) -> bool:
    """Whether a folder has a file; one request.

    Raises:
        AccessError: The store refuses to say.
        StorageError: Storage failed.
    """
    try:
        storage.size_and_etag(path)
    except ObjectMissingError:
        return False
    return True


def check_buffer(extent: Extent, buffer: memoryview) -> None:
    """Refuse a buffer that is not as long as its extent.

    Raises:
        ValueError: The lengths differ.
    """
    if buffer.nbytes != extent.num_bytes:
        raise ValueError(f"a buffer of {buffer.nbytes} bytes cannot hold extent {extent} of {extent.num_bytes} bytes")
