"""What has one neighbour yet to be told? Numbers, which share messages, then everything else in order."""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import NamedTuple

from ray_streamer.exchange.messages import MAX_NUMBERS, MessageKind, encode_numbers


class Letter(NamedTuple):
    """One message, and the descriptor that travels beside it; -1 when none does. Whoever holds the letter closes it."""

    message: bytes
    fd: int = -1

    def send(self, connection: socket.socket) -> None:
        """Sends the message; the descriptor stays open here."""
        if self.fd < 0:
            connection.send(self.message)
        else:
            socket.send_fds(connection, [self.message], [self.fd])

    def close(self) -> None:
        """Lets go of the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)


class Outbox:
    """Messages to one neighbour that wait to be sent."""

    def __init__(self) -> None:
        self._numbers: dict[MessageKind, deque[int]] = {MessageKind.ANNOUNCE: deque(), MessageKind.RELEASE: deque()}
        self._letters: deque[Letter] = deque()

    def add(self, kind: MessageKind, numbers: tuple[int, ...]) -> None:
        """Queues numbers; tuples stay whole."""
        self._numbers[kind].extend(numbers)

    def add_letter(self, letter: Letter) -> None:
        """Queues a message behind all numbers, and owns its descriptor."""
        self._letters.append(letter)

    def next_letter(self) -> Letter | None:
        """Takes the next message out, or None."""
        for kind, numbers in self._numbers.items():
            if numbers:
                taken = [numbers.popleft() for _ in range(min(len(numbers), MAX_NUMBERS))]
                return Letter(encode_numbers(kind, taken))
        return self._letters.popleft() if self._letters else None

    def close(self) -> None:
        """Drops what was not sent."""
        while self._letters:
            self._letters.popleft().close()
