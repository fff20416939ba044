"""Where is the checkpoint? On a local disk, in an S3 server, behind a web server: each place prepares itself, and counts."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from ray_streamer.testing.rgw import missing_programs
from ray_streamer.testing.s3_server import start_s3_server
from side_by_side.nginx import Nginx
from side_by_side.page_cache import cool_page_cache, warm_page_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

Kind = Literal["disk", "s3", "web"]

TITLES = {
    "disk-cold": "local disk, files not in the page cache",
    "disk-warm": "local disk, files in the page cache",
    "s3": "RADOS Gateway, plain HTTP",
    "s3-tls": "RADOS Gateway, TLS",
    "web": "nginx, plain HTTP",
    "web-tls": "nginx, TLS",
}
"""Every place, by the name that the command line takes."""

KINDS: dict[str, Kind] = {name: "disk" if "disk" in name else "s3" if "s3" in name else "web" for name in TITLES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The checkpoint in one place.

    Attributes:
        name: One of `TITLES`.
        uri: What loaders are given.
        prepare: Called before each run.
        environment: Variables by which clients find the server and trust it.
        bytes_sent: What the server has sent so far, by its own count; None where there is no server.
    """

    name: str
    uri: str
    prepare: Callable[[], None]
    environment: Mapping[str, str] = field(default_factory=dict)
    bytes_sent: Callable[[], int] | None = None

    @property
    def kind(self) -> Kind:
        """What it is, whatever its state and transport."""
        return KINDS[self.name]


@contextmanager
def open_places(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Place | str]]:
    """The checkpoint of `folder` in the places `names`; a place that cannot be here is the reason why."""
    opened: dict[str, Place | str] = {}
    with ExitStack() as stack:
        if "disk" in {KINDS[name] for name in names}:
            opened |= _disk(folder)
        if "s3" in {KINDS[name] for name in names}:
            opened |= _s3(stack, folder)
        if "web" in {KINDS[name] for name in names}:
            opened |= _web(stack, folder)
        yield {name: opened[name] for name in names}


def _disk(folder: Path) -> dict[str, Place]:
    states = {"disk-cold": cool_page_cache, "disk-warm": warm_page_cache}
    return {
        name: Place(name=name, uri=str(folder.absolute()), prepare=partial(prepare, folder))
        for name, prepare in states.items()
    }


def _s3(stack: ExitStack, folder: Path) -> dict[str, Place | str]:
    missing = missing_programs()
    if missing:
        reason = f"{', '.join(missing)} not found; apt-get install radosgw ceph-mon ceph-osd"
        return {"s3": reason, "s3-tls": reason}
    server = stack.enter_context(start_s3_server("rgw", tls=True))
    uri = server.upload_folder(folder, "benchmark", "model")
    plain = {"AWS_EC2_METADATA_DISABLED": "true", **server.environment()}
    over_tls = plain | {"AWS_ENDPOINT_URL": str(server.tls_endpoint_url), "AWS_CA_BUNDLE": str(server.ca_file)}
    return {
        name: Place(name=name, uri=uri, prepare=_nothing, environment=environment, bytes_sent=server.bytes_sent)
        for name, environment in (("s3", plain), ("s3-tls", over_tls))
    }


def _web(stack: ExitStack, folder: Path) -> dict[str, Place | str]:
    if not Nginx.is_installed():
        reason = "nginx not found; apt-get install nginx-light"
        return {"web": reason, "web-tls": reason}
    server = stack.enter_context(Nginx(folder.parent))
    trust = {"SSL_CERT_FILE": str(server.ca_file), "REQUESTS_CA_BUNDLE": str(server.ca_file)}
    return {
        name: Place(
            name=name,
            uri=f"{url}/{folder.name}",
            # The server's files are in memory, as those of the S3 server are.
            prepare=partial(warm_page_cache, folder),
            environment=environment,
            bytes_sent=server.bytes_sent,
        )
        for name, url, environment in (("web", server.url, {}), ("web-tls", server.tls_url, trust))
    }


def _nothing() -> None:
    """An S3 server's objects are in its memory."""
