"""How does the Hugging Face Hub answer? A local Hub and a server for its content delivery, as huggingface_hub 2.4 expects them.

Large files are sent on to signed addresses that end; small ones are answered directly. A push makes a new commit, and old ones stay.
Sources: huggingface_hub 2.4 (`hf_raise_for_status`, `get_hf_file_metadata`, `list_repo_tree`, `_pagination`), and its documentation.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from ray_streamer.testing.file_server import file_bytes
from ray_streamer.testing.hostile_store import Asked, HostileStore, answer_bytes

if TYPE_CHECKING:
    from typing import Self

_RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_TREE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/?]+)/?([^?]*)")
SIGNATURE = "plantedsignature0123456789"
"""Part of every signed address."""


class HubServer(HostileStore):
    """The Hub, for the length of a `with` block.

    Attributes:
        delivery: Gives large files, to those who have a signed address.
        token: Who has it may see private and gated repositories.
        private: Repositories that nobody else sees.
        renamed: Repositories that have another name now; that of each.
        gated: Repositories whose files nobody else gets.
        page_size: Entries of one page of a listing.
    """

    def __init__(self) -> None:
        super().__init__(self.answer_hub)
        self.delivery = HostileStore(self.answer_delivery)
        self.token = "hf_plantedtoken0123456789"
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.page_size = 1000
        self._files: dict[str, dict[str, bytes]] = {}
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self._blobs: dict[str, bytes] = {}
        self._num_signatures = 0
        self._first_good_signature = 0

    def push(self, repository: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Make a commit with these files besides those of before; gives its name."""
        self._files[repository] = {**self._files.get(repository, {}), **files}
        commit = hashlib.sha1(f"{len(self._commits)}".encode()).hexdigest()
        self._commits[repository, commit] = dict(self._files[repository])
        self._branches[repository, branch] = commit
        return commit

    def end_addresses(self) -> None:
        """No signed address that was given until now is good any more."""
        self._first_good_signature = self._num_signatures

    def answer_hub(self, asked: Asked) -> bytes:
        """The answer to one request to the Hub."""
        resolve, tree = _RESOLVE.fullmatch(asked.key), _TREE.fullmatch(asked.key)
        if resolve is None and tree is None:
            return answer_bytes(404)
        repository, revision, path = (unquote(part) for part in (resolve or tree).groups())  # type: ignore[union-attr]
        if repository in self.renamed:
            location = asked.target.replace(f"/{repository}/", f"/{self.renamed[repository]}/", 1)
            return answer_bytes(307, b"Temporary Redirect", {"Location": location})
        refusal = self._refusal(asked, repository, is_file=resolve is not None)
        if refusal:
            return refusal
        commit = self._branches.get((repository, revision), revision)
        files = self._commits.get((repository, commit))
        if files is None:
            return _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if resolve is None:
            return self._tree(asked, files, path)
        if path not in files:
            return _refused(404, "EntryNotFound", "Entry not found", commit=commit)
        return self._resolve(asked, files[path], commit, is_large=path.endswith(".safetensors"))

    def answer_delivery(self, asked: Asked) -> bytes:
        """The answer to one request for a large file."""
        number = int(parse_qs(asked.target.partition("?")[2]).get("n", ["-1"])[0])
        if SIGNATURE not in asked.target or number < self._first_good_signature or "authorization" in asked.headers:
            return answer_bytes(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        content = self._blobs.get(asked.key.lstrip("/"))
        if content is None:
            return answer_bytes(404)
        return file_bytes(content, asked, etag=f'"delivery-{hashlib.md5(content).hexdigest()}"')

    def _refusal(self, asked: Asked, repository: str, *, is_file: bool) -> bytes | None:
        is_known = asked.headers.get("authorization") == f"Bearer {self.token}"
        exists = repository in self._files and (is_known or repository not in self.private)
        if not exists:
            # Who is nobody does not learn what there is.
            return _refused(404 if is_known else 401, "RepoNotFound", "Repository not found")
        if is_file and repository in self.gated and not is_known:
            return _refused(401, "GatedRepo", f"Access to model {repository} is restricted")
        return None

    def _resolve(self, asked: Asked, content: bytes, commit: str, *, is_large: bool) -> bytes:
        digest = hashlib.sha256(content).hexdigest()
        headers: dict[str, str | None] = {"X-Repo-Commit": commit}
        if not is_large:
            answer = file_bytes(content, asked, etag=f'"{hashlib.sha1(content).hexdigest()}"')
            return answer.replace(b"\r\n", f"\r\nX-Repo-Commit: {commit}\r\n".encode(), 1)
        self._blobs[digest] = content
        number, self._num_signatures = self._num_signatures, self._num_signatures + 1
        location = (
            f"{self.delivery.url}/{digest}?n={number}&Expires=1&Policy=plantedpolicy0123456789&Signature={SIGNATURE}"
        )
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": location}
        return answer_bytes(302, b"", headers)

    def _tree(self, asked: Asked, files: dict[str, bytes], folder: str) -> bytes:
        query = parse_qs(asked.target.partition("?")[2])
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in files if path.startswith(prefix))
        if folder and not below:
            return _refused(404, "EntryNotFound", f"{folder} does not exist")
        is_recursive = query.get("recursive") == ["true"]
        shown = dict.fromkeys(
            path if is_recursive else prefix + path[len(prefix) :].partition("/")[0] for path in below
        )
        entries = [{"type": "file" if path in files else "directory", "path": path} for path in shown]
        start = int(query.get("cursor", ["0"])[0])
        page, stop = entries[start : start + self.page_size], start + self.page_size
        more = {"Link": f'<{self.url}{asked.key}?cursor={stop}>; rel="next"'} if stop < len(entries) else {}
        return answer_bytes(200, json.dumps(page).encode(), more)

    def __enter__(self) -> Self:
        self.delivery.__enter__()
        return super().__enter__()

    def __exit__(self, *reason: object) -> None:
        super().__exit__(*reason)
        self.delivery.__exit__(*reason)


def _refused(status: int, code: str, message: str, *, commit: str | None = None) -> bytes:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return answer_bytes(status, json.dumps({"error": message}).encode(), headers)
