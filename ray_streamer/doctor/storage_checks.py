"""May the checkpoint be read from here, and does the server agree on the time? Headers are read; errors become findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.doctor.finding import Finding, failed
from ray_streamer.errors import AccessError, CredentialsError, ObjectMissingError, RayStreamerError
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.storage.object_storage import ObjectStorage
from ray_streamer.storage.server_clock import clock_skew_seconds
from ray_streamer.units import counted, exact_bytes, human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.checkpoint.index import ShardFile
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.storage.base import Storage

MOST_SKEW_SECONDS = 300.0
"""S3 refuses requests whose date is more than 15 minutes off; a third of that is worth saying."""

_MOST_REMOTE_FILES = 8
"""All nodes see the same object store: a few of its files tell whether a node may read it."""


def check_checkpoint(request: LoadRequest, storage: Storage) -> tuple[CheckpointIndex | None, list[Finding]]:
    """Reads the headers, as a load does; no index where they cannot be read."""
    try:
        index = request.read_index(storage)
    except RayStreamerError as error:
        return None, [checkpoint_refused(error)]
    found = f"{counted(len(index), 'tensor')} in {counted(len(index.files), 'file')}, {human_bytes(index.total_bytes)}"
    return index, [Finding(subject="checkpoint", level="good", found=f"readable: {found}")]


def check_files(storage: Storage, files: Sequence[ShardFile]) -> Finding:
    """Whether files that another node saw are here, too, with the same sizes; of an object store, some of them."""
    step = -(-len(files) // _MOST_REMOTE_FILES) if storage.is_remote else 1
    looked_at = files[:: max(1, step)]
    try:
        for file in looked_at:
            size = storage.size_and_etag(file.path).size_bytes
            if size != file.size_bytes:
                return _of_another_size(f"{storage.uri.rstrip('/')}/{file.path}", size, file.size_bytes)
    except RayStreamerError as error:
        return checkpoint_refused(error)
    checked = f"{len(looked_at)} of {counted(len(files), 'file')}"
    return Finding(
        subject="checkpoint",
        level="good",
        found=f"{checked} looked at, with the sizes that the node of this command sees",
    )


def _of_another_size(path: str, size: int, expected: int) -> Finding:
    return Finding(
        subject="checkpoint",
        level="error",
        found=f"{path} has {exact_bytes(size)}; on the node of this command it has {exact_bytes(expected)}",
        why="Ranks on two nodes would load different weights, or fail.",
        advice="Mount the same folder on every node, or copy the file again.",
    )


def checkpoint_refused(error: RayStreamerError) -> Finding:
    """What the error of a read, or of opening the storage, means for this node."""
    if isinstance(error, ObjectMissingError):
        why, advice = "There is nothing to load.", "Check the uri, and that this node has the mount that holds it."
    elif isinstance(error, CredentialsError):
        why = "This node has no credentials that the store takes."
        advice = "The message says what was looked for, or what the store says of them; see docs/stores.md for where credentials come from."
    elif isinstance(error, AccessError):
        why = "The store refuses this node's credentials, region or clock."
        advice = "The message says which; see docs/s3.md for where credentials and region come from."
    else:
        return failed("checkpoint", error)
    return Finding(subject="checkpoint", level="error", found=str(error), why=why, advice=advice)


def check_clock(storage: Storage, *, timeout_seconds: float) -> list[Finding]:
    """Compares this clock with the `Date` of the store's server; nothing where there is no such server."""
    if not isinstance(storage, ObjectStorage):
        return []
    try:
        skew = clock_skew_seconds(storage.endpoint, ca_file=storage.ca_file, timeout_seconds=timeout_seconds)
    except OSError as error:
        return [
            Finding(
                subject="server",
                level="error",
                found=f"no answer: {error}",
                why="Nothing can be read from a server that does not answer.",
                advice="Check the endpoint, the network and the proxy variables.",
            )
        ]
    if skew is None:
        return []
    if abs(skew) <= MOST_SKEW_SECONDS:
        return [Finding(subject="clock", level="good", found=f"within {abs(skew):.0f} s of the server's")]
    return [
        Finding(
            subject="clock",
            level="error",
            found=f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's",
            why="Signed requests are refused when their date is more than a few minutes off.",
            advice="Set this node's clock, such as by chrony or systemd-timesyncd.",
        )
    ]


def check_throttling(storage: Storage) -> list[Finding]:
    """Whether requests failed while the storage was measured; nothing where none did."""
    told = storage.statistics()
    if told.num_throttled:
        return [
            Finding(
                subject="throttling",
                level="warning",
                found=f"the store answered {counted(told.num_throttled, 'request')} with the wish to slow down, while up to 64 were in flight",
                why="Refused requests are sent again after a wait, and fewer of them at once.",
                advice="Lower concurrency, spread the files over more prefixes, or ask the store's operator for a higher limit.",
            )
        ]
    if told.num_retries:
        return [
            Finding(
                subject="requests",
                level="warning",
                found=f"{counted(told.num_retries, 'request')} failed and had to be sent again",
                why="A load waits for requests that are sent again, and ends when that happens for retry_deadline_seconds.",
                advice="Run with logging at INFO to see what failed; look at the network and at proxies on the way.",
            )
        ]
    return []


def check_filesystem(storage: Storage, index: CheckpointIndex) -> list[Finding]:
    """What kind of file system holds the files, and how much of them is in the page cache."""
    if storage.is_remote or not index.files:
        return []
    path = storage.local_path(index.files[0].path)
    if path is None:
        return []
    mount = mount_of(path, read_mount_table())
    num_cached = sum(storage.is_resident(file.path) for file in index.files)
    found = f"{mount.kind} at {mount.point}; {num_cached} of {counted(len(index.files), 'file')} in the page cache"
    if mount.kind == "overlay":
        return [
            Finding(
                subject="file system",
                level="warning",
                found=found,
                why="The files are in a layer of the container's image, on the disk of the container engine.",
                advice="Keep checkpoints on a volume, or in an object store.",
            )
        ]
    return [Finding(subject="file system", level="good", found=found)]
