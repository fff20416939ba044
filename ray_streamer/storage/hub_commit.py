"""Of which commit are the files of a branch read?

Of the one that the first answer names; later requests ask for that one. A branch may move at any time. So until its commit is known
one request is under way at a time, and an answer that names another commit is refused. A commit or a server that names none needs
no waiting.
"""

from __future__ import annotations

import re
import threading

from ray_streamer.errors import ObjectChangedError

_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class PinnedCommit:
    """The revision to ask for; safe to call from many threads. A commit that was given is held to like one that was learned.

    Args:
        what: The uri, for messages.
        revision: A branch, tag or commit.
        wait_seconds: How long to wait for another thread that asks for the branch.
    """

    def __init__(self, what: str, revision: str, *, wait_seconds: float) -> None:
        self._what = what
        self._given = revision
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._is_settled = bool(_COMMIT.fullmatch(revision))
        self._commit = revision if self._is_settled else ""
        self._asking: int | None = None

    @property
    def revision(self) -> str:
        """The commit where it is known, else what was given."""
        return self._commit or self._given

    def take_turn(self) -> None:
        """Returns when this thread may ask the Hub.

        Waits while another thread asks for the branch, until `note` or `end`.
        """
        if self._is_settled:
            return
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._is_settled or self._asking in (None, me), self._wait_seconds)
            if not self._is_settled:
                self._asking = me

    def note(self, commit: str, *, has_files: bool) -> bool:
        """An answer came; whether the branch has a commit from now on.

        Args:
            commit: What it names; empty for nothing.
            has_files: Whether it would name one if this server ever did: it gives a file, or says where one is.

        Raises:
            ObjectChangedError: It is of another commit than the files before.
        """
        is_named = bool(_COMMIT.fullmatch(commit))
        with self._changed:
            if is_named and self._commit and commit != self._commit:
                raise ObjectChangedError(
                    f"{self._what}: an answer is of commit {commit}, and the files are read of {self._commit}; if the branch moved "
                    f"meanwhile load again, or give a commit, hf://ORG/MODEL@{self._commit}"
                )
            is_first = is_named and not self._commit
            if is_first:
                self._commit = commit
            if is_named or has_files:
                self._is_settled = True
                self._changed.notify_all()
            return is_first

    def end(self) -> None:
        """The request of this thread is over, whatever became of it; another thread may ask."""
        if self._asking is None:
            return
        with self._changed:
            if self._asking == threading.get_ident():
                self._asking = None
                self._changed.notify_all()
