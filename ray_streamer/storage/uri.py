"""Which place does a uri mean, and may the uri be repeated in plans, reports, logs and errors?

`absolute_uri` is asked where the caller speaks, once: a relative path means the caller's folder, and `~` the caller's home, not
those of the ranks. `scheme_of` chooses the backend.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote

from ray_streamer.errors import SettingsError
from ray_streamer.storage.stores import STORES

ARROW_SCHEMES = frozenset({"gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
"""What pyarrow opens, some of it only if the uri has pyarrow's options."""

_SIGNATURES = frozenset({"x-amz-signature", "x-amz-security-token", "x-goog-signature", "signature", "sig"})
_TOKENS = frozenset({"token", "access_token"})

FILE_NAMES = (".safetensors", ".json")
"""How the names of the files end that a uri may mean."""

UriLike = str | os.PathLike[str]
"""What the caller may say: text, or a path object for a local path."""

_MEANT = {"huggingface": "hf", "s3a": "s3", "s3n": "s3"}
"""What other libraries call a store."""
# What stands before the "@" is a container, or a user without a password of a store that has no passwords.
_SCHEMES_WITH_USERS = frozenset({"abfss", "abfs", "hdfs", "viewfs", "file", "memory"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ARROW_SCHEMES | {"file", "memory"} | {scheme for kind in STORES for scheme in kind.schemes}
_COLLAPSED = re.compile(rf"({'|'.join(sorted(_SCHEMES - {'file'}))}):/[^/]", re.IGNORECASE)
_SECRET_OPTIONS = frozenset(
    {"sig", "sas_token", "client_secret", "account_key", "access_key", "secret_key", "password"}
)


def scheme_of(uri: str) -> str:
    """The scheme in lower case; "file" for a path without one.

    >>> scheme_of("S3://bucket/model"), scheme_of("/models/llama")
    ('s3', 'file')

    Raises:
        SettingsError: No backend knows the scheme, or the uri has credentials in it, which are not repeated.
    """
    match = _SCHEME.match(uri)
    if match is None:
        _refuse_signature(uri)
        return "file"
    scheme, rest = match[1].lower(), uri[match.end() :]
    authority, _, query = rest.partition("?")
    user = authority.partition("/")[0].rpartition("@")[0]
    options = {name for name, _ in parse_qsl(query)} if scheme in ARROW_SCHEMES else set[str]()
    may_have_user = scheme in _SCHEMES_WITH_USERS or (scheme in ("gs", "gcs") and user == "anonymous")
    if ":" in user or (user and not may_have_user) or _SECRET_OPTIONS & options:
        raise SettingsError(
            f"a {scheme}:// uri has credentials in it, and uris appear in plans, reports and errors; {_without_user(scheme)}"
        )
    if scheme in ("http", "https") and ("?" in rest or "#" in rest):
        raise SettingsError(
            f"an {scheme}:// uri has a query or a '#' here, where it would be shown; give the uri up to the '?', and what follows "
            "it, as in signed addresses, in the setting http_query (RAY_STREAMER_HTTP_QUERY), which is shown nowhere; a SAS token of "
            "Azure goes into AZURE_STORAGE_SAS_TOKEN"
        )
    _refuse_signature(uri)
    shown = uri.partition("?")[0]
    if scheme in _MEANT:
        raise SettingsError(f"no storage for {shown}: did you mean {_MEANT[scheme]}://{rest.partition('?')[0]}?")
    if scheme not in _SCHEMES:
        stores = ", ".join(f"{kind.schemes[0]}://" for kind in STORES)
        raise SettingsError(
            f"no storage for {shown}: scheme {scheme}:// is not known; give a path, file:///path, {stores}, hdfs:// or memory://name"
        )
    _refuse_signature(uri, _TOKENS)
    return scheme


def _without_user(scheme: str) -> str:
    """What to give in place of a uri with an "@" before its first slash."""
    if scheme == "hf":
        return "give hf://ORG/MODEL[@REVISION], and the token in HF_TOKEN"
    if scheme == "az":
        return (
            "give az://CONTAINER/PREFIX, and the account in AZURE_STORAGE_ACCOUNT_NAME; or "
            "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
        )
    return "give them as the store's own tools take them (for S3: AWS_ACCESS_KEY_ID, or the setting s3_access_key_id), see docs/s3.md"


def _refuse_signature(uri: str, names: frozenset[str] = _SIGNATURES) -> None:
    """Signed addresses are the web's: elsewhere a signature would be taken for a part of the name, and shown."""
    address, _, query = uri.partition("?")
    if names & {name.lower() for name, _ in parse_qsl(query)}:
        raise SettingsError(
            f"{address} has a signature or token behind its '?', and only addresses that begin with https:// are signed"
        )


def absolute_uri(uri: UriLike) -> str:
    """`uri` as every other process understands it: a local path made absolute, anything else as it is.

    A relative path begins at the current folder, `~` and `~user` are home folders, and `file:` uris become plain paths. `..` and
    symbolic links stay, since they may lead elsewhere on another node.

    >>> absolute_uri("file:///models/my%20model/"), absolute_uri("s3://bucket/model")
    ('/models/my model', 's3://bucket/model')

    Raises:
        SettingsError: It is no uri, or it has credentials in it.
    """
    if not isinstance(uri, (str, os.PathLike)):
        # Not repeated: it may be a list of signed addresses.
        raise SettingsError(f"a uri is text or a path here, got {type(uri).__name__}")
    text = os.fsdecode(uri)
    collapsed = _COLLAPSED.match(text)
    if collapsed:
        raise SettingsError(
            f"a uri has one slash after {collapsed[1]}:, as pathlib makes it; give it as text: {collapsed[1]}://..."
        )
    if scheme_of(text) != "file":
        return text
    path = _path_of(text)
    if not path:
        raise SettingsError("an empty path names no folder; give '.' for the current one")
    if "\0" in path:
        raise SettingsError(f"a path cannot contain a null character: {path!r}")
    parts = [part for part in os.path.join(_current_folder(path), path).split("/") if part not in ("", ".")]
    # Only a slash at its end tells a folder of such a name from a file.
    is_named_like_a_file = path.endswith("/") and bool(parts) and parts[-1].endswith(FILE_NAMES)
    return "/" + "/".join(parts) + ("/" if is_named_like_a_file else "")


def absolute_folder(path: UriLike) -> str:
    """The local folder that files are to be written to, absolute as in `absolute_uri`.

    Raises:
        SettingsError: It is no path, or the uri of a store, which is read and never written to.
    """
    folder = absolute_uri(path)
    if scheme_of(folder) != "file":
        raise SettingsError(
            f"{folder} is no local folder, and files are copied into a local folder only; give its path"
        )
    return folder


def _path_of(uri: str) -> str:
    """The path that a plain path or `file:` uri (RFC 8089) means, with home folders expanded."""
    if not uri.lower().startswith(("file:/", "file://")):
        return os.path.expanduser(uri)
    rest = uri[len("file:") :]
    if not rest.startswith("//"):
        return unquote(rest)
    host, slash, path = rest[2:].partition("/")
    if host.startswith("~"):
        return os.path.expanduser(unquote(host + slash + path))
    if host.lower() not in ("", "localhost"):
        raise SettingsError(f"{uri} names host {host!r}; a local folder is file:///path, with three slashes")
    return unquote(slash + path)


def _current_folder(path: str) -> str:
    """Where a relative path begins."""
    try:
        return "/" if path.startswith("/") else os.getcwd()
    except FileNotFoundError:
        raise SettingsError(
            f"{path} is relative to the current folder, which was deleted; give an absolute path"
        ) from None
