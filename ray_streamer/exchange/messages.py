"""What do neighbours say to each other? Six small messages, one datagram each.

HELLO     who I am, which plan I hold, how my arena is cut (its descriptor travels beside it)
VIEWED    from the first rank of the node: files that everybody copies from a mapping, so nobody reads them
ANNOUNCE  these blocks lie in these slots of mine: take your pieces
RELEASE   I took my pieces from these slots of yours
DONE      I have every byte I wanted and need nothing more from you
FAILED    I stop, and why
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass

import numpy as np

from ray_streamer.errors import ClusterError

MAX_MESSAGE_BYTES = 128 << 10
MAX_NUMBERS = 1024
"""Most numbers in one message: even, so that pairs stay whole; few enough for the smallest socket buffer there is."""

MAX_REASON_CHARACTERS = 8000


class Kind(enum.IntEnum):
    """First byte of a message."""

    HELLO = 1
    VIEWED = 2
    ANNOUNCE = 3
    RELEASE = 4
    DONE = 5
    FAILED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Opens a connection.

    Attributes:
        local_rank: Of the sender.
        plan_hash: Of the plan that the sender executes; a neighbour with another one refuses.
        num_slots: Slots of the sender's arena; 0 when it has none and sends no descriptor.
        slot_bytes: Size of a slot.
    """

    local_rank: int
    plan_hash: str
    num_slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank stopped.

    Attributes:
        rank: Global rank that failed first, as far as the sender knows.
        node: Its node.
        reason: Type and text of its error.
    """

    rank: int
    node: str
    reason: str


def encode_hello(hello: Hello) -> bytes:
    """One HELLO message."""
    return bytes([Kind.HELLO]) + json.dumps(asdict(hello)).encode()


def decode_hello(payload: bytes) -> Hello:
    """The content of a HELLO message, without its first byte.

    Raises:
        ClusterError: The peer speaks another version.
    """
    try:
        return Hello(**json.loads(payload))
    except (ValueError, TypeError) as error:
        raise ClusterError(f"a neighbour opened with a greeting that this version cannot read: {error}") from error


def encode_failure(failure: Failure) -> bytes:
    """One FAILED message; long reasons are cut."""
    fields = asdict(failure) | {"reason": failure.reason[:MAX_REASON_CHARACTERS]}
    return bytes([Kind.FAILED]) + json.dumps(fields).encode()


def decode_failure(payload: bytes) -> Failure:
    """The content of a FAILED message."""
    return Failure(**json.loads(payload))


def encode_numbers(kind: Kind, numbers: list[int]) -> bytes:
    """One message of plain numbers: ANNOUNCE (block, slot, block, slot, ...), RELEASE (slot, ...), VIEWED (file, ...)."""
    return bytes([kind]) + np.array(numbers, dtype="<u4").tobytes()


def decode_numbers(payload: bytes) -> list[int]:
    """The numbers of such a message."""
    return np.frombuffer(payload, dtype="<u4").tolist()
