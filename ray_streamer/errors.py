"""What can go wrong, as a tree: catch the branch that you can act on.

    RayStreamerError
    ├── SettingsError            a setting or argument cannot mean anything       (also ValueError)
    ├── CheckpointError          the checkpoint is not what it should be
    │   ├── HeaderError          one file's safetensors header is malformed
    │   └── IndexMismatchError   index json and headers disagree
    ├── ShardingError            no rule, or a rule that cannot cut this tensor
    ├── CaptureError             an engine's loader did what cannot be followed
    ├── PlanError                slices, topology and checkpoint do not fit together
    ├── StorageError             bytes did not come from storage
    │   ├── ObjectMissingError   no such file or object                           (also FileNotFoundError)
    │   ├── ShortReadError       storage ended before the extent did
    │   ├── ObjectChangedError   the object is not the one the index saw
    │   ├── AccessError          credentials or permissions                       (also PermissionError)
    │   │   └── CredentialsError no credentials were found, or the store does not take them
    │   └── ThrottledError       the store asked us to slow down, for too long
    ├── BudgetError              a limit of memory, threads or open files cannot work
    ├── DeviceError              the destination cannot be used
    └── ClusterError             Ray could not give, or keep, what the load needs
        ├── StartupTimeoutError  a rank did not start in time                     (also TimeoutError)
        ├── RankFailedError      one rank failed; names rank, node and cause
        └── LoadAbortedError     this rank stopped because another one failed

Messages say: what, where (file, tensor, rank, extent), got and expected, what to change. Every class survives pickling,
with its attributes, since errors cross process borders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


class RayStreamerError(Exception):
    """Base of every error that this package raises on purpose; its text holds nothing that a terminal obeys."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingsError(RayStreamerError, ValueError):
    """A setting or argument cannot mean anything; names it and its origin."""


class CheckpointError(RayStreamerError):
    """The checkpoint is not what it should be; names uri and file."""


class HeaderError(CheckpointError):
    """The safetensors header of one file is malformed; names file and rule."""


class IndexMismatchError(CheckpointError):
    """`model.safetensors.index.json` and the files' headers disagree."""


class ShardingError(RayStreamerError):
    """No rule for a tensor, or a rule that cannot cut it; lists the tensors."""


class CaptureError(RayStreamerError):
    """An engine's loader did what cannot be followed; names tensor and operation."""


class PlanError(RayStreamerError):
    """Slices, topology and checkpoint do not fit together."""


class StorageError(RayStreamerError):
    """Bytes did not come from storage; names uri, extent and attempt."""


class ObjectMissingError(StorageError, FileNotFoundError):
    """No such file, object, bucket or folder."""


class ShortReadError(StorageError):
    """Storage ended before the extent did: the file is truncated."""


class ObjectChangedError(StorageError):
    """The object's size or ETag is not the one that the index saw."""


class AccessError(StorageError, PermissionError):
    """Credentials are missing, wrong or not allowed to read."""


class CredentialsError(AccessError):
    """No credentials were found in time, or the store does not take them: an unknown key, a wrong signature or clock, an expired token."""


class ThrottledError(StorageError):
    """The store kept asking us to slow down until the deadline passed."""


class BudgetError(RayStreamerError):
    """A limit of memory, threads or open files cannot work, the user's or the system's; names it and what would work."""


class DeviceError(RayStreamerError):
    """The destination device or memory cannot be used."""


class ClusterError(RayStreamerError):
    """Ray could not give, or keep, what the load needs."""


class StartupTimeoutError(ClusterError, TimeoutError):
    """Ranks did not start in time; names the silent ranks and the setting.

    Attributes:
        ranks: Global ranks that the others waited for; empty where it was no rank that did not come.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class LoadAbortedError(ClusterError):
    """This rank stopped because another rank failed; names that rank."""


class RankFailedError(ClusterError):
    """One rank failed, so the load failed.

    Attributes:
        rank: Global rank, or -1 when it is not known.
        node: Node id or host name of that rank.
        cause: The error that the rank met, or a sentence about its process, which died or does not answer.
    """

    def __init__(self, rank: int, node: str, cause: BaseException | str) -> None:
        self.rank = rank
        self.node = node
        self.cause = cause
        what = f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else cause
        super().__init__(f"rank {rank} on node {node} failed: {what}")

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int, str, BaseException | str]]:
        return type(self), (self.rank, self.node, self.cause)
