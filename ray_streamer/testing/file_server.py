"""How do web servers give files? A real one on 127.0.0.1, with ranges, ETags and conditions as RFC 9110 has them, and redirects."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ray_streamer.testing.hostile_store import Asked, HostileStore, answer_bytes

if TYPE_CHECKING:
    from collections.abc import Callable


class FileServer(HostileStore):
    """Files in memory, for the length of a `with` block; give `files` by their paths, without "/" at the beginning.

    Attributes:
        files: What there is; may be changed at any time.
        redirect: Where a request is sent; None to answer it here.
        authorization: What requests must say in that header; empty for everybody.
        has_ranges: Whether parts are given.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(self.answer_file)
        self.files = files if files is not None else {}
        self.redirect: Callable[[Asked], str | None] = lambda _: None
        self.authorization = ""
        self.has_ranges = True

    def answer_file(self, asked: Asked) -> bytes:
        """The answer to one request."""
        if self.authorization and asked.headers.get("authorization") != self.authorization:
            return answer_bytes(401, b"who?", {"WWW-Authenticate": "Bearer"})
        location = self.redirect(asked)
        if location is not None:
            return answer_bytes(302, b"over there", {"Location": location})
        content = self.files.get(unquote(asked.key).lstrip("/"))
        if content is None:
            return answer_bytes(404, b"<html>nothing here</html>")
        return file_bytes(content, asked, has_ranges=self.has_ranges)


def file_bytes(content: bytes, asked: Asked, *, etag: str = "", has_ranges: bool = True) -> bytes:
    """The answer about one file: whole, in part, or that it is another one than the condition names."""
    etag = etag or f'"{hashlib.sha256(content).hexdigest()}"'
    headers = {"ETag": etag, "Content-Type": "application/octet-stream"}
    if asked.headers.get("if-match", etag) != etag:
        return answer_bytes(412, b"", headers)
    extent = asked.extent
    if extent is None or not has_ranges:
        return answer_bytes(200, content, headers)
    if extent.start >= len(content):
        return answer_bytes(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    body = content[extent.start : extent.stop]
    stop = extent.start + len(body)
    return answer_bytes(206, body, {**headers, "Content-Range": f"bytes {extent.start}-{stop - 1}/{len(content)}"})
