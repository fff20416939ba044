"""Which object stores are there, and what may their uris be? One row per store; the table of docs/stores.md is made of them.

A row names the module of a store, which is imported when a uri of it is opened: it may need a package that is not installed.
That module has `open_store(uri, settings)`, which gives an `ObjectStore`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_AZURE_CREDENTIALS = (
    "`AZURE_STORAGE_CONNECTION_STRING`, `AZURE_STORAGE_SAS_TOKEN` or `AZURE_STORAGE_ACCOUNT_KEY`; else azure-identity; or none with "
    "`azure_unsigned`"
)


@dataclass(frozen=True, slots=True)
class UriForm:
    """One way to write a uri.

    Attributes:
        form: With names in capitals for what differs.
        meaning: What it is.
        credentials: Which are used, if nothing is said.
        needs_extra: Whether the store's extra must be installed for it.
    """

    form: str
    meaning: str
    credentials: str
    needs_extra: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKind:
    """One kind of store.

    Attributes:
        name: As people call it.
        schemes: Of its uris.
        module: With its `open_store`.
        forms: Its uris.
        extra: What of this package to install for it besides; empty when nothing is needed.
        hosts: Uris of other schemes that are this store's, too.
        num_root_folders: How many folders behind its host belong to what a uri is opened at, at the least, as a model's name does.
        num_root_folders_of_hosts: The same of `hosts`, as a container's name does.
        schemes_of_pyarrow: Whose uris with a query are pyarrow's, whose options they hold.
    """

    name: str
    schemes: tuple[str, ...]
    module: str
    forms: tuple[UriForm, ...]
    extra: str = ""
    hosts: re.Pattern[str] | None = None
    num_root_folders: int = 0
    num_root_folders_of_hosts: int = 0
    schemes_of_pyarrow: tuple[str, ...] = ()


S3 = StoreKind(
    name="S3",
    schemes=("s3",),
    module="ray_streamer.storage.s3",
    forms=(
        UriForm(
            "s3://BUCKET/PREFIX",
            "a bucket of Amazon or of any compatible store",
            "as boto3 finds them, see s3.md; or none with `s3_unsigned`",
        ),
    ),
)

WEB = StoreKind(
    name="web server",
    schemes=("https", "http"),
    module="ray_streamer.storage.web",
    forms=(
        UriForm(
            "https://HOST/FOLDER",
            "a folder with model.safetensors.index.json, or with one model.safetensors",
            "`http_authorization`, `http_query`, or none",
        ),
        UriForm("https://HOST/FOLDER/NAME.safetensors", "one file", "the same"),
        UriForm(
            "https://HOST/FOLDER?SIGNATURE", "either of them, signed; or a list of files, each signed", "the signature"
        ),
    ),
)

HUB = StoreKind(
    name="Hugging Face Hub",
    schemes=("hf",),
    module="ray_streamer.storage.hub",
    forms=(
        UriForm(
            "hf://ORG/MODEL",
            "a model of the Hub, at the last commit of its main branch",
            "`HF_TOKEN` or `hf auth login`, or none",
        ),
        UriForm(
            "hf://ORG/MODEL@REVISION/FOLDER",
            "a branch, tag, commit or refs/pr/N of it, and a folder or file in it",
            "the same",
        ),
    ),
    extra="hub",
    num_root_folders=1,
)

GOOGLE = StoreKind(
    name="Google Cloud Storage",
    schemes=("gs", "gcs"),
    module="ray_streamer.storage.gcs",
    forms=(
        UriForm(
            "gs://BUCKET/PREFIX",
            "a bucket of Google",
            "Google's application default credentials, or none with `gs_unsigned`",
        ),
        UriForm("gs://anonymous@BUCKET/PREFIX", "a public bucket", "none", needs_extra=False),
    ),
    extra="google",
    schemes_of_pyarrow=("gs", "gcs"),
)

AZURE = StoreKind(
    name="Azure Blob Storage",
    schemes=("az", "abfss", "abfs"),
    module="ray_streamer.storage.azure",
    forms=(
        UriForm("az://CONTAINER/PREFIX", "a container of the account that Azure's variables name", _AZURE_CREDENTIALS),
        UriForm("abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX", "a container of an account", "the same"),
        UriForm("https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX", "the same", "the same"),
    ),
    extra="azure",
    hosts=re.compile(
        r"https://[a-z0-9]{3,24}(\.z[0-9]+)?\.(blob|dfs)\.(core\.(windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)|storage\.azure\.net)/",
        re.IGNORECASE,
    ),
    num_root_folders_of_hosts=1,
    schemes_of_pyarrow=("abfss", "abfs"),
)

STORES = (S3, GOOGLE, AZURE, WEB, HUB)


def num_root_folders(uri: str, scheme: str) -> int:
    """See `StoreKind.num_root_folders`; none for places that are no stores.

    >>> num_root_folders("hf://org/model/a.safetensors", "hf"), num_root_folders("s3://bucket/a.safetensors", "s3")
    (1, 0)
    """
    kind = store_kind(uri, scheme)
    if kind is None:
        return 0
    return kind.num_root_folders if scheme in kind.schemes else kind.num_root_folders_of_hosts


def store_kind(uri: str, scheme: str) -> StoreKind | None:
    """The store of a uri with this scheme in lower case, or None.

    >>> store_kind("S3://bucket/model", "s3").name
    'S3'
    """
    of_host = next((kind for kind in STORES if kind.hosts and kind.hosts.match(uri)), None)
    found = of_host or next((kind for kind in STORES if scheme in kind.schemes), None)
    return None if found and scheme in found.schemes_of_pyarrow and "?" in uri else found
