"""What do ranks of a node say to each other? Eight small messages, one datagram each; all of them are parsed, none is unpickled.

HELLO     who I am; opens a connection, and answers it
VALUE     a rank's contribution to one step of the session; a large one, and memory that is lent, come as a descriptor beside it
ANNOUNCE  these blocks lie in these slots of mine: take your pieces
RELEASE   I took my pieces from these slots of yours
DONE      I have every byte of this load and need nothing more from you
PULSE     I live; so many steps are done, and this is what I do
FAILED    I stop, and why
BYE       I leave the session, as agreed
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ray_streamer import errors
from ray_streamer.errors import ClusterError, RankFailedError, RayStreamerError, StartupTimeoutError
from ray_streamer.units import counted

PROTOCOL_VERSION = 3

MAX_MESSAGE_BYTES = 128 << 10
MAX_NUMBERS = 1024
"""Most numbers in one message: even, so that pairs stay whole; few enough for the smallest socket buffer there is."""

MAX_INLINE_BYTES = 2048
"""Longest value inside a message; a longer one travels as a descriptor."""

MAX_REASON_CHARACTERS = 8000
MAX_PHASE_BYTES = 200

_MAX_LOCAL_RANKS = 1 << 16
_VALUE_HEAD = struct.Struct("<IQQ")
_PULSE_HEAD = struct.Struct("<QB")


class MessageKind(enum.IntEnum):
    """First byte of a message."""

    HELLO = 1
    VALUE = 2
    ANNOUNCE = 3
    RELEASE = 4
    DONE = 5
    FAILED = 6
    PULSE = 7
    BYE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Opens a connection.

    Attributes:
        local_rank: Of the sender.
        num_local_ranks: Ranks that the sender expects on this node.
        version: Of the protocol.
    """

    local_rank: int
    num_local_ranks: int
    version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        for name in ("local_rank", "num_local_ranks", "version"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not 0 <= self.local_rank < self.num_local_ranks <= _MAX_LOCAL_RANKS:
            raise ValueError(f"local rank {self.local_rank} of {counted(self.num_local_ranks, 'rank')} cannot be")


HANDED_OVER = (1 << 64) - 1
"""In place of a length: the memory is not mapped, its descriptor is given."""


class ValueHead(NamedTuple):
    """What a VALUE says before its bytes.

    Attributes:
        step: Number of the session's step.
        value_bytes: Length of the value; when the message holds less, the descriptor beside it holds it.
        memory_bytes: Length of the memory that the descriptor beside it lends; 0 when none is lent; `HANDED_OVER` when the receiver
            keeps the descriptor itself.
    """

    step: int
    value_bytes: int
    memory_bytes: int


class Pulse(NamedTuple):
    """What a rank does.

    Attributes:
        num_steps: Pieces of work that it finished so far; grows as long as it gets on.
        is_busy: Whether it has work of its own under way, rather than waiting for others.
        phase: What it does, in words.
    """

    num_steps: int
    is_busy: bool
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank stopped.

    Attributes:
        rank: Global rank that failed first, as far as the sender knows.
        node: Its node.
        kind: Class of its error; empty when nobody raised one, as at the death of a process.
        text: What the error says.
        absent: Global ranks that the sender gave up waiting for, where that is its error.
    """

    rank: int
    node: str
    kind: str
    text: str
    absent: tuple[int, ...] = ()

    @classmethod
    def of(cls, error: BaseException | None, *, rank: int, node: str) -> Failure:
        """What `rank` tells the others about the error that ended its part."""
        if isinstance(error, RankFailedError):
            rank, node = error.rank, error.node
            if not isinstance(error.cause, BaseException):
                return cls(rank=rank, node=node, kind="", text=str(error.cause))
            error = error.cause
        absent = error.ranks if isinstance(error, StartupTimeoutError) else ()
        return cls(rank=rank, node=node, kind=type(error).__name__, text=str(error), absent=absent)

    def as_error(self) -> RankFailedError | StartupTimeoutError:
        """The error of everybody else; its cause has the class of the failed rank's, where that is one of this package.

        A rank that gave up waiting for a third one did not fail itself: its error is everybody's.
        """
        if self.absent:
            return StartupTimeoutError(self.text, self.absent)
        known = getattr(errors, self.kind, None) if self.kind else None
        if isinstance(known, type) and issubclass(known, RayStreamerError) and known is not RankFailedError:
            return RankFailedError(self.rank, self.node, known(self.text))
        return RankFailedError(self.rank, self.node, f"{self.kind}: {self.text}" if self.kind else self.text)


def encode_hello(hello: Hello) -> bytes:
    """One HELLO message."""
    return bytes([MessageKind.HELLO]) + json.dumps(asdict(hello)).encode()


def decode_hello(message: bytes) -> Hello:
    """The content of a HELLO message.

    Raises:
        ValueError: It is none, or one of another version.
    """
    if not message or message[0] != MessageKind.HELLO:
        raise ValueError(f"said {message[:20]!r}")
    try:
        fields: dict[str, Any] = json.loads(message[1:])
        version = fields["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("opened with a greeting that is none") from None
    if version != PROTOCOL_VERSION:
        raise ValueError(f"speaks version {version!r} of the protocol, this rank speaks {PROTOCOL_VERSION}")
    try:
        return Hello(**fields)
    except TypeError:
        raise ValueError("opened with a greeting that is none") from None


def encode_value(head: ValueHead, inline: bytes) -> bytes:
    """One VALUE message; `inline` is the value, or empty when a descriptor holds it."""
    return bytes([MessageKind.VALUE]) + _VALUE_HEAD.pack(*head) + inline


def decode_value(payload: bytes) -> tuple[ValueHead, bytes]:
    """Head and inline value of a VALUE message, without its first byte."""
    return ValueHead._make(_VALUE_HEAD.unpack_from(payload)), payload[_VALUE_HEAD.size :]


def encode_pulse(pulse: Pulse) -> bytes:
    """One PULSE message."""
    phase = pulse.phase.encode()[:MAX_PHASE_BYTES]
    return bytes([MessageKind.PULSE]) + _PULSE_HEAD.pack(pulse.num_steps, pulse.is_busy) + phase


def decode_pulse(payload: bytes) -> Pulse:
    """The content of a PULSE message, without its first byte."""
    num_steps, is_busy = _PULSE_HEAD.unpack_from(payload)
    return Pulse(num_steps, bool(is_busy), payload[_PULSE_HEAD.size :].decode(errors="replace"))


def encode_failure(failure: Failure) -> bytes:
    """One FAILED message; long reasons are cut."""
    fields = asdict(failure) | {"text": failure.text[:MAX_REASON_CHARACTERS]}
    return bytes([MessageKind.FAILED]) + json.dumps(fields).encode()


def decode_failure(payload: bytes) -> Failure:
    """The content of a FAILED message, without its first byte."""
    fields = json.loads(payload)
    return Failure(
        rank=int(fields["rank"]),
        node=str(fields["node"]),
        kind=str(fields["kind"]),
        text=str(fields["text"]),
        absent=tuple(map(int, fields["absent"])),
    )


def encode_numbers(kind: MessageKind, numbers: list[int]) -> bytes:
    """One message of plain numbers: ANNOUNCE (block, slot, block, slot, ...) or RELEASE (slot, ...)."""
    return bytes([kind]) + np.array(numbers, dtype="<u4").tobytes()


def decode_numbers(payload: bytes) -> list[int]:
    """The numbers of such a message."""
    return np.frombuffer(payload, dtype="<u4").tolist()


def unreadable(rank: int, error: Exception) -> ClusterError:
    """The error for a message of rank `rank` that means nothing here."""
    return ClusterError(
        f"rank {rank} sent a message that this rank cannot read ({type(error).__name__}: {error}); give all ranks the same "
        "version of ray_streamer"
    )
