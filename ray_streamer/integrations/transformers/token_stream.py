"""How do tokens reach the driver while all ranks generate? The first rank is asked again and again, beside the call that runs.

a thread here      group.call("generate")             on all ranks, for as long as it takes; its answer has all tokens
the caller         group.control("take_tokens")       on the first rank's other lane; answers when there is a token

A rank keeps the tokens of one generation. Who takes them late, when the next generation has begun, gets them from the answer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_streamer.errors import ClusterError, RankFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ray_streamer.cluster.group import WorkerGroup

# How long a rank holds back an answer without tokens: a rank that died is noticed after that.
_WAIT_SECONDS = 0.25
# A rank's second lane answers at once, on however busy a node.
_ANSWER_SECONDS = 30.0


class Generated(NamedTuple):
    """What a generation ended with, on the first rank.

    Attributes:
        tokens: As transformers' `generate` gives them: prompt and answer, of shape (num_sequences, length).
        streamed: The new token ids, in order; none where nobody asked for them.
    """

    tokens: torch.Tensor
    streamed: list[int]


class Generation:
    """One generation under way on all ranks.

    Args:
        group: The ranks.
        arguments: Of transformers' `generate`.
        ticket: Its number.
        seed: Of sampling.
        streams: Whether tokens can be taken meanwhile.
        on_end: Called once, when it is over, with whether all ranks are idle then.
    """

    def __init__(
        self,
        group: WorkerGroup,
        arguments: dict[str, Any],
        *,
        ticket: int,
        seed: int,
        streams: bool,
        on_end: Callable[..., None],
    ) -> None:
        self._group = group
        self._ticket = ticket
        self._ended: Future[Generated] = Future()
        args = (group, (arguments, ticket, seed, streams), self._ended, on_end)
        # The thread does not know this object, so that one that nobody holds can stop the ranks.
        threading.Thread(target=_run, args=args, name="ray_streamer-generate", daemon=True).start()

    def result(self) -> torch.Tensor:
        """All tokens; waits for them.

        Raises:
            RankFailedError: A rank failed.
        """
        return self._ended.result().tokens

    @property
    def is_over(self) -> bool:
        """Whether all ranks have returned, or one has failed."""
        return self._ended.done()

    def take(self, seen: int) -> list[int]:
        """Tokens after the first `seen`; waits a moment for one."""
        if self.is_over and self._ended.exception() is None:
            return self._ended.result().streamed[seen:]
        try:
            return self._group.control(
                "take_tokens", self._ticket, seen, _WAIT_SECONDS, ranks=[0], timeout_seconds=_ANSWER_SECONDS
            )[0]
        except ClusterError:
            # The call on all ranks tells of it, and better.
            wait_for_futures([self._ended], _WAIT_SECONDS)
            return []

    def stop(self) -> None:
        """Ends it with the next token; does not wait for that."""
        if not self.is_over:
            with suppress(ClusterError):
                self._group.control("stop", self._ticket, timeout_seconds=_ANSWER_SECONDS)


class TokenStream(Iterator[int]):
    """The new tokens of a generation, each as it comes; made by `TransformersModel.stream`. One thread takes them."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._waiting: deque[int] = deque()
        self._num_taken = 0
        self._is_over = False

    def __next__(self) -> int:
        """The next token id; waits for it."""
        while not self._waiting:
            if self._is_over:
                self._generation.result()
                raise StopIteration
            # Asked before the tokens, so that none comes between.
            self._is_over = self._generation.is_over
            tokens = self._generation.take(self._num_taken)
            self._num_taken += len(tokens)
            self._waiting += tokens
        return self._waiting.popleft()

    def close(self) -> None:
        """Ends the generation at its next token; further tokens are not given."""
        self._waiting.clear()
        if not self._is_over:
            self._is_over = True
            self._generation.stop()

    def __del__(self) -> None:
        """Ends the generation."""
        self.close()


def _run(group: WorkerGroup, args: tuple[Any, ...], ended: Future[Generated], on_end: Callable[..., None]) -> None:
    try:
        generated = group.call("generate", *args, keep_on_failure=True)[0]
    except BaseException as error:
        # A process that died or was stopped answers nothing.
        has_answered = not (isinstance(error, RankFailedError) and isinstance(error.cause, str))
        on_end(is_in_step=has_answered and _are_idle(group))
        ended.set_exception(error)
    else:
        on_end(is_in_step=True)
        ended.set_result(generated)


def _are_idle(group: WorkerGroup) -> bool:
    """Whether every rank lives, and has ended its generation, as when all refuse the same argument."""
    try:
        return all(group.control("is_idle", timeout_seconds=_ANSWER_SECONDS))
    except ClusterError:
        return False
