"""What of an https uri may be repeated? All but its query, which signs it: that is taken off first, and travels as a secret.

    https://host/m?Q                              every file of the folder is asked for with Q
    https://host/m/model.safetensors?Q            the same; one file of the folder is meant
    https://host/m/a?Q and https://host/m/b?R     these files and no others, each with its own query

A signature belongs to one folder: who opens another one finds none. Content delivery networks call files by hashes, and the query says
under which name a browser would save them: that is the file's name then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ray_streamer.errors import SettingsError
from ray_streamer.storage.uri import FILE_NAMES, UriLike, absolute_uri

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.storage.base import StorageSettings

UrisLike = UriLike | Sequence[str]
"""What the caller of a load may say: one uri, or the https addresses of a checkpoint's files."""

_WEB = re.compile(r"https?://", re.IGNORECASE)
_SAVED_AS = re.compile(
    r"filename\*=(?:utf-8)?'[^']*'(?P<encoded>[^;\s]+)|filename=\"(?P<quoted>[^\"]+)\"|filename=(?P<plain>[^;\s\"]+)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Signature:
    """What is sent behind the addresses of one folder.

    Attributes:
        uri: The folder, or one file in it, as it may be repeated.
        query: Of all its files; a secret.
        files: All files that there are, if it is known: name -> its address below the folder, with its query; secrets.
    """

    uri: str
    query: str = field(default="", repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, uri: str, settings: StorageSettings) -> Signature:
        """What the settings say of the folder at `uri`; without query and files if they say nothing.

        Raises:
            SettingsError: The setting is none that this package made.
        """
        if settings.http_signed is None:
            return cls(uri)
        try:
            said: Any = json.loads(settings.http_signed.get_secret_value())
            found = cls(said["uri"], said["query"], said["files"])
            of_folder = found.uri.rstrip("/")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SettingsError(
                "http_signed (not shown) is made by ray_streamer from signed uris; leave it out"
            ) from None
        folders = (of_folder,) if found.files else (of_folder, of_folder.rpartition("/")[0])
        return found if uri.rstrip("/") in folders else cls(uri)

    @property
    def as_setting(self) -> str | None:
        """The value of the setting `http_signed`; None when there is nothing to say."""
        if not self.query and not self.files:
            return None
        return json.dumps({"uri": self.uri, "query": self.query, "files": dict(self.files)})


def split_signature(uri: UrisLike) -> Signature:
    """The uri as it may be repeated, absolute, and what must be sent besides.

    Raises:
        SettingsError: It is no uri, or no list of files of one folder of a web server; repeats no query.
    """
    if isinstance(uri, Sequence) and not isinstance(uri, str):
        return _of_files(uri)
    if isinstance(uri, str) and _WEB.match(uri.strip()):
        signature = _split(uri)
        below = signature.uri.rpartition("/")[2]
        named = _name_of(below, signature.query)
        is_called_otherwise = bool(below) and named != unquote(below) and named.endswith(FILE_NAMES)
        return _of_files([uri]) if is_called_otherwise else signature
    return Signature(absolute_uri(uri))


def _split(uri: str) -> Signature:
    """A web address without its query, and that."""
    clean, _, query = uri.strip().partition("?")
    # What follows "#" is for browsers only.
    return Signature(absolute_uri(clean), query.partition("#")[0])


def _name_of(below: str, query: str) -> str:
    """What a file is called: as its address ends, or, where that says nothing, as browsers would save it (RFC 6266)."""
    name = unquote(below)
    said = {key.lower(): value for key, value in parse_qsl(query)}
    saved_as = _SAVED_AS.search(said.get("response-content-disposition") or said.get("rscd") or "")
    if name.endswith(FILE_NAMES) or saved_as is None:
        return name
    folder = name.rpartition("/")[0]
    saved = unquote(saved_as["encoded"]) if saved_as["encoded"] else saved_as["quoted"] or saved_as["plain"]
    return "/".join(filter(None, (folder, saved.rpartition("/")[2])))


def _of_files(uris: Sequence[object]) -> Signature:
    """The folder that has all these files."""
    if not uris:
        raise SettingsError("an empty list names no files; give the addresses of a checkpoint's files, or its folder")
    addresses = [_address(uri) for uri in uris]
    servers = {_server_of(address) for address, _ in addresses}
    if len(servers) > 1:
        raise SettingsError(
            f"files of one checkpoint come from one server, these from {len(servers)}: {', '.join(sorted(servers))}"
        )
    folder = _common_folder([address for address, _ in addresses])
    files: dict[str, str] = {}
    for address, query in addresses:
        below = address[len(folder) + 1 :]
        name = _name_of(below, query)
        if name in files:
            raise SettingsError(f"{folder}: {name} is given twice")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise SettingsError(f"{folder}: {name!r} is no name of a file")
        files[name] = f"{below}?{query}" if query else below
    return Signature(folder, files=files)


def _address(uri: object) -> tuple[str, str]:
    """One file's address, and its query."""
    if not isinstance(uri, str) or not _WEB.match(uri.strip()):
        scheme = str(uri).partition("://")[0] if "://" in str(uri) else type(uri).__name__
        raise SettingsError(
            f"a list of files is one of https addresses, and one entry is none ({scheme}); elsewhere give the folder"
        )
    signature = _split(uri)
    return f"{_server_of(signature.uri)}{urlsplit(signature.uri).path}", signature.query


def _common_folder(addresses: Sequence[str]) -> str:
    """The folder that all are in, as deep as can be.

    >>> _common_folder(["https://host/m/one/a", "https://host/m/b"])
    'https://host/m'
    """
    parts = zip(*(address.split("/")[:-1] for address in addresses), strict=False)
    return "/".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts))


def _server_of(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}"
