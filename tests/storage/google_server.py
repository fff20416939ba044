"""Google's emulator with a thread per client, in a process of its own: pyarrow keeps the interpreter lock while it waits.

Prints its address, and ends with its standard input.
"""

from __future__ import annotations

import functools
import sys
import threading
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


def main() -> None:
    objects = Storage(use_memory_fs=True)
    buckets.create_bucket("models", objects)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(RequestHandler, objects))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("{}:{}".format(*server.server_address), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
