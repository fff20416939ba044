"""What does it mean when the Hugging Face Hub refuses? It says so in headers of its own.

Source: huggingface_hub 2.4, `hf_raise_for_status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import ObjectMissingError
from ray_streamer.storage.web import WebRefusal, status_text

if TYPE_CHECKING:
    from ray_streamer.errors import StorageError
    from ray_streamer.storage.retry import PassingFault


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRefusal(WebRefusal):
    """See `Refusal`.

    Attributes:
        repository: As people write it.
        page: Where a person sees it, and asks for access.
        has_token: Whether the Hub was told who asks.
    """

    repository: str = ""
    page: str = ""
    has_token: bool = False

    def error(self, what: str, *, is_object: bool = True) -> StorageError | PassingFault:
        """See `Refusal`."""
        if self.code == "RepoNotFound" and self.status in (401, 403, 404):
            return ObjectMissingError(
                f"no such repository, {what}: {self}; {self.repository} is misspelt, or private: {self._who}"
            )
        return super(HubRefusal, self).error(what, is_object=is_object)

    @property
    def what_is_missing(self) -> str:
        """See `Refusal`."""
        return "revision" if self.code == "RevisionNotFound" else "file"

    def advice(self, *, is_object: bool) -> list[str]:
        """See `Refusal`."""
        if self.was_sent_on:
            return []
        if self.code == "GatedRepo":
            return [
                f"the repository is gated: ask for access at {self.page}, and let the Hub know who asks: {self._who}"
            ]
        return [self._who] if self.status in (401, 403) else []

    @property
    def _who(self) -> str:
        return (
            "look at the rights of the token in HF_TOKEN or of `hf auth login`"
            if self.has_token
            else "set HF_TOKEN, or `hf auth login`"
        )

    def __str__(self) -> str:
        told = " ".join(filter(None, (self.code, f"({self.message})" if self.message else "")))
        return f"{status_text(self.status)} {told}".rstrip()
