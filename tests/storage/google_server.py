"""Google's emulator with a thread per client, in a process of its own: pyarrow keeps the interpreter lock while it waits.

The emulator leaves out what Google's own servers say of an object's version, and takes no conditions; that is added here. Sources:
Google Cloud Storage, "Request preconditions", "Headers and common query parameters for XML" (x-goog-generation).
Prints its address, and ends with its standard input.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

_OBJECT = re.compile(r"/storage/v1/b/([^/]+)/o/(.+)")
_RANGE = re.compile(r"bytes=([0-9]+)-[0-9]*")


class GoogleHandler(RequestHandler):
    """The emulator's, with generations."""

    generation = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query, named = parse_qs(url.query), _OBJECT.fullmatch(url.path)
        self.generation = ""
        refusal = None
        if named and query.get("alt") == ["media"]:
            try:
                refusal = self._refusal(self.storage.get_file_obj(*map(unquote, named.groups())), query)
            except NotFound:
                refusal = 404, f"No such object: {unquote(named[1])}/{unquote(named[2])}"
        if refusal is None:
            super().do_GET()
        else:
            self._refuse(*refusal)

    def _refusal(self, found: dict, query: dict) -> tuple[int, str] | None:
        self.generation = found["generation"]
        if query.get("ifGenerationMatch", [self.generation]) != [self.generation]:
            return 412, "At least one of the pre-conditions you specified did not hold."
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked and int(asked[1]) >= int(found["size"]):
            return 416, "The requested range cannot be satisfied."
        return None

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps({"error": {"code": status, "message": message, "errors": [{"message": message}]}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()


def main() -> None:
    objects = Storage(use_memory_fs=True)
    buckets.create_bucket("models", objects)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(GoogleHandler, objects))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("{}:{}".format(*server.server_address), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
