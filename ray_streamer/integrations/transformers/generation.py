"""How do tokens leave a rank while it generates, and how do all ranks stop at the same token?

    the thread that generates  ── put ──> TokenFeed ── take ──> another thread, which waits for tokens
    the thread that generates  <── is_stopped ── another thread, which was told to stop

A rank that stopped alone would leave the others in a collective, so each token ends with one flag that all ranks share.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from typing import Any


class TokenFeed(BaseStreamer):
    """The tokens of one generation after another; what transformers calls a streamer.

    Each generation has a number, its ticket, so that words about one are not taken for words about the next.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ticket = 0
        self._last_stopped = 0
        self._tokens: list[int] = []
        self._is_over = True
        self._has_prompt = False

    def begin(self, ticket: int) -> None:
        """A generation begins; tickets grow."""
        with self._changed:
            self._ticket, self._tokens, self._is_over, self._has_prompt = ticket, [], False, False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then each token; called by transformers.

        Raises:
            ValueError: There are several sequences.
        """
        # The prompt is of shape (num_sequences, length), tokens of shape (num_sequences,).
        if value.shape[0] > 1:
            raise ValueError(f"the tokens of one sequence can be streamed, got {value.shape[0]} sequences")
        with self._changed:
            if self._has_prompt:
                self._tokens += value.flatten().tolist()
                self._changed.notify_all()
            self._has_prompt = True

    def end(self) -> None:
        """No more tokens come; called by transformers, and by whoever ends a generation that failed."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def take(self, ticket: int, seen: int, wait_seconds: float) -> list[int]:
        """Tokens of that generation after the first `seen`; waits until there is one, it is over, or for `wait_seconds`."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._ticket > ticket or (self._ticket == ticket and (self._is_over or len(self._tokens) > seen))
                ),
                wait_seconds,
            )
            return self._tokens[seen:] if self._ticket == ticket else []

    def stop(self, ticket: int) -> None:
        """The generation, and those before it, end with their next token."""
        with self._changed:
            self._last_stopped = max(self._last_stopped, ticket)

    @property
    def is_stopped(self) -> bool:
        """Whether the generation under way is to end."""
        return self._ticket <= self._last_stopped

    @property
    def is_over(self) -> bool:
        """Whether nothing is generated."""
        return self._is_over


class StopTogether(StoppingCriteria):
    """Ends a generation on all ranks once any of them was told to stop; a collective at each token.

    Args:
        feed: Which knows whether this rank was.
    """

    def __init__(self, feed: TokenFeed) -> None:
        self._feed = feed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Whether each sequence ends; of shape (num_sequences,)."""
        flag = torch.tensor([self._feed.is_stopped], dtype=torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return torch.full((input_ids.shape[0],), bool(flag.item()), dtype=torch.bool, device=input_ids.device)
