"""Azure's blobs keep the contract, for keys, SAS tokens and identities; nobody sees any of them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import re
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode

import pytest
from pyarrow import fs

from ray_streamer.errors import (
    AccessError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    SettingsError,
    StorageError,
    ThrottledError,
)
from ray_streamer.extent import Extent
from ray_streamer.storage.azure_account import account_of
from ray_streamer.storage.azure_listing import parse_page
from ray_streamer.storage.listing import ListingPage
from ray_streamer.testing.azure_identity import MachineIdentity
from ray_streamer.testing.azurite import ACCOUNT, KEY, azurite, azurite_program
from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import file_bytes
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes
from ray_streamer.testing.storage_suite import (
    CONTENT,
    PASSING_FAULTS,
    StorageContract,
    check_load,
    check_read_through,
    read,
    write_llama,
)

PLANTED = re.compile("planted|Eby8vdM02", re.IGNORECASE)
PLANTED_KEY = base64.b64encode(b"planted key of 32 bytes or more..").decode()
_numbers = itertools.count()


@dataclass
class AzurePlace:
    """A prefix of a container, to which pyarrow writes."""

    uri: str
    filesystem: fs.FileSystem
    root: str
    url: str

    def write(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.root}/{path}") as stream:
            stream.write(content)


@pytest.fixture(scope="module")
def azurite_url():
    program = azurite_program()
    if program is None:
        pytest.skip("no Azurite here: npm install --no-save azurite")
    with azurite(program) as url:
        filesystem_of(url).create_dir("models")
        yield url


def filesystem_of(url):
    authority = url.removeprefix("http://")
    return fs.AzureFileSystem(
        ACCOUNT,
        account_key=KEY,
        blob_storage_authority=authority,
        blob_storage_scheme="http",
        dfs_storage_authority=authority,
        dfs_storage_scheme="http",
    )


def connect(monkeypatch, url, **more):
    said = {"AccountName": ACCOUNT, "BlobEndpoint": f"{url}/{ACCOUNT}", **more}
    text = ";".join(f"{name}={value}" for name, value in said.items())
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)


@pytest.fixture
def place(azurite_url, monkeypatch):
    connect(monkeypatch, azurite_url, AccountKey=KEY)
    prefix = f"prefix {next(_numbers)}/llama+ü"
    return AzurePlace(f"az://models/{prefix}", filesystem_of(azurite_url), f"models/{prefix}", azurite_url)


class TestAzurite(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place


def sas_token(*, permissions="rl", expires_in=timedelta(hours=1)):
    """A token of the account, as Azure documents its signature ("Create an account SAS")."""
    said = {
        "sp": permissions,
        "ss": "b",
        "srt": "co",
        "st": "",
        "se": f"{datetime.now(UTC) + expires_in:%Y-%m-%dT%H:%M:%SZ}",
    }
    said |= {"sip": "", "spr": "https,http", "sv": "2023-11-03", "ses": ""}
    text = "\n".join([ACCOUNT, *said.values(), ""])
    signature = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    return urlencode(
        {name: value for name, value in said.items() if value} | {"sig": base64.b64encode(signature).decode()}
    )


def test_a_sas_token(place, open_store, monkeypatch):
    place.write("a", CONTENT)
    connect(monkeypatch, place.url, SharedAccessSignature=sas_token())
    storage = open_store(place.uri)
    assert storage.list() == ["a"]
    assert read(storage, "a", Extent(5, 99), storage.size_and_etag("a").etag) == CONTENT[5:99]
    # As the portal gives it for a SAS token: without the account's name.
    nameless = f"BlobEndpoint={place.url}/{ACCOUNT};SharedAccessSignature={sas_token()}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", nameless)
    assert open_store(place.uri).list() == ["a"]
    connect(monkeypatch, place.url)
    folder = f"https://{ACCOUNT}.blob.core.windows.net/{quote(place.root)}"
    assert open_store(f"{folder}?{sas_token()}").list() == ["a"]
    for token in (sas_token(permissions="l"), sas_token(expires_in=-timedelta(hours=1))):
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?{token}")
        with pytest.raises(AccessError, match=r"az://models/.*HTTP 403 Auth") as caught:
            open_store(place.uri).read_head("a", 4)
        assert ("the signature of the address ended at" in str(caught.value)) == ("sp=rl" in token)
        signature = token.partition("sig=")[2]
        assert signature not in "".join(traceback.format_exception(caught.value))


def test_a_sas_token_of_the_uri_comes_first(store, open_store, monkeypatch):
    """An address as the portal shows it, with its token; what stands in for the account is named by the environment."""
    store.good = {None}
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sig=of-the-environment")
    token = "sv=2023-11-03&sig=plantedsas0123456789%3D"
    storage = open_store(f"https://{ACCOUNT}.blob.core.windows.net/models/my%20m?{token}")
    assert storage.read_head("a", 4)[0] == CONTENT[:4]
    assert storage.list() == []
    assert [asked.target.startswith(f"/{ACCOUNT}/models/my%20m/a?{token}") for asked in store.requests] == [True, False]
    assert store.requests[-1].target.endswith(f"&{token}")
    store.answer = lambda asked: refused(403, "AuthenticationFailed", f"{asked.target}")
    with pytest.raises(AccessError, match="AuthenticationFailed") as caught:
        storage.read_head("a", 4)
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


def test_signed_addresses_of_single_blobs(open_store):
    """Each blob has a token of its own, so they are a list of files like any other."""
    host = f"https://{ACCOUNT}.blob.core.windows.net"
    storage = open_store([f"{host}/models/m/{name}?sig=planted{name}0123456789" for name in ("a", "b")])
    assert storage.list() == ["a", "b"]
    assert storage._store.object_request("b", {}, None).url == f"{host}/models/m/b?sig=plantedb0123456789"


def test_a_wrong_key(place, open_store, monkeypatch):
    place.write("a", CONTENT)
    connect(monkeypatch, place.url, AccountKey=PLANTED_KEY)
    for ask in (lambda storage: storage.read_head("a", 4), lambda storage: storage.list()):
        with pytest.raises(AccessError, match=r"HTTP 403 AuthorizationFailure") as caught:
            ask(open_store(place.uri))
        assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


def test_a_container_that_is_not_there(place, open_store):
    for ask in (lambda storage: storage.read_head("a", 4), lambda storage: storage.list()):
        with pytest.raises(ObjectMissingError, match=r"no such container.*ContainerNotFound"):
            ask(open_store("az://nowhere/m"))


@PASSING_FAULTS
def test_faults_end_bit_for_bit(place, open_store, monkeypatch, fault):
    place.write("a", CONTENT)
    with FaultProxy(place.url) as proxy:
        connect(monkeypatch, proxy.url, AccountKey=KEY)
        storage = open_store(place.uri, stall_timeout_seconds=0.5)
        check_read_through(storage, proxy, fault)


def test_a_checkpoint_is_loaded(place, tmp_path):
    write_llama(tmp_path)
    for path in tmp_path.iterdir():
        place.write(path.name, path.read_bytes())
    check_load(place.uri, tmp_path)


@pytest.fixture
def identity(monkeypatch):
    with MachineIdentity() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def store(monkeypatch):
    """What stands at the account's address; gives a blob to those whose token is in `good`."""

    def answer(asked):
        assert asked.headers["x-ms-version"]
        if asked.headers.get("authorization") not in store.good:
            return refused(401, "NoAuthenticationInformation", f"who is {dict(asked.headers)} {asked.target}?")
        if "comp=list" in asked.target:
            return answer_bytes(200, listing("<Blob><Name>m/a</Name></Blob>"))
        return file_bytes(CONTENT, asked)

    with HostileStore(answer) as store:
        store.good = {"Bearer planted-token-1", "Bearer planted-token-2"}
        connect(monkeypatch, store.url)
        yield store


def refused(status, code, message=""):
    body = f"\ufeff<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}\nRequestId:1\nTime:2</Message></Error>"
    return answer_bytes(status, body.encode(), {"x-ms-error-code": code, "x-ms-request-id": "request-1"})


def listing(blobs, marker=""):
    return f"\ufeff<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>".encode()


def test_tokens_of_an_identity_are_used_and_renewed(identity, store, open_store):
    storage = open_store("az://models/m")
    assert storage.list() == ["a"]
    # Longer pages than Azure gives then would be longer than is read.
    assert "maxresults=1000" in store.requests[-1].target
    etag = storage.size_and_etag("a").etag
    assert read(storage, "a", Extent(5, 99), etag) == CONTENT[5:99]
    assert store.requests[-1].headers["if-match"] == etag
    assert identity.num_tokens == 1
    # Azure takes the token no longer, and azure-identity remembers it.
    store.good = {"Bearer planted-token-2"}
    assert read(storage, "a", Extent(5, 99), etag) == CONTENT[5:99]
    assert identity.num_tokens == 2
    store.good = set()
    with pytest.raises(AccessError, match=r"az://models/m/a.*HTTP 401.*`az login`") as caught:
        read(storage, "a", Extent(5, 99), etag)
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


def test_tokens_that_end_are_renewed_before(identity, store, open_store):
    identity.lifetime_seconds = 30
    storage = open_store("az://models/m")
    for _ in range(2):
        storage.size_and_etag("a")
    assert identity.num_tokens == 2


def test_a_token_is_used_to_its_end_if_it_cannot_be_renewed(identity, store, open_store, caplog):
    identity.lifetime_seconds = 30
    storage = open_store("az://models/m")
    storage.size_and_etag("a")
    identity.answer = lambda _: answer_bytes(400, b"{}", {"Content-Type": "application/json"})
    for _ in range(3):
        storage.size_and_etag("a")
    assert "still good, and will be renewed later" in caplog.text
    storage._store._tokens._ends_at = 0.0
    with pytest.raises(CredentialsError, match="azure-identity has no credentials"):
        storage.size_and_etag("a")


def test_nobody_asks(store, open_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    store.good = {None}
    storage = open_store("az://models/m", azure_unsigned=True)
    assert (storage.list(), storage.read_head("a", 4)[0]) == (["a"], CONTENT[:4])


def test_without_azure_identity(store, open_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'ray_streamer[azure]'")):
        open_store("az://models/m").list()


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (404, "BlobNotFound", ObjectMissingError, "no such blob"),
        (404, "ContainerNotFound", ObjectMissingError, "no such container"),
        (403, "AuthorizationPermissionMismatch", AccessError, "Storage Blob Data Reader"),
        (409, "PublicAccessNotPermitted", AccessError, "AZURE_STORAGE_CONNECTION_STRING"),
        (409, "BlobArchived", StorageError, "rehydrate"),
        (412, "ConditionNotMet", ObjectChangedError, "not the one"),
        (503, "ServerBusy", ThrottledError, "slow down"),
        (418, "Odd", StorageError, r"HTTP 418 Odd \(in words\), request id request-1"),
    ],
)
def test_what_azure_says_is_told(store, open_store, status, code, error, words):
    store.answer = lambda _: refused(status, code, "in words.")
    with pytest.raises(error, match=words) as caught:
        open_store("az://models/m", azure_unsigned=True, retry_deadline_seconds=0.1).size_and_etag("a")
    assert "(in words)" in str(caught.value)


ACCOUNTS = {
    "az://models/m": "http://127.0.0.1:10000/devstoreaccount1",
    "abfss://models@other.dfs.core.windows.net/m": "https://other.blob.core.windows.net",
    "abfs://models@other.blob.core.chinacloudapi.cn/m": "https://other.blob.core.chinacloudapi.cn",
    "abfss://Our Models@onelake.dfs.fabric.microsoft.com/my.Lakehouse/Files/m": "https://onelake.blob.fabric.microsoft.com",
    "https://other.blob.core.usgovcloudapi.net/models/m": "https://other.blob.core.usgovcloudapi.net",
    "https://devstoreaccount1.blob.core.windows.net/models/m": "http://127.0.0.1:10000/devstoreaccount1",
}


@pytest.mark.parametrize("uri", ACCOUNTS)
def test_where_an_account_is(open_store, monkeypatch, uri):
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true")
    assert open_store(uri)._store.endpoint == ACCOUNTS[uri]


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({"ACCOUNT_NAME": "mine"}, "https://mine.blob.core.windows.net"),
        ({"ACCOUNT": "mine", "ENDPOINT_SUFFIX": "core.chinacloudapi.cn"}, "https://mine.blob.core.chinacloudapi.cn"),
        ({"CONNECTION_STRING": f"DefaultEndpointsProtocol=https;AccountName=mine;AccountKey={PLANTED_KEY};EndpointSuffix=core.cloudapi.de"}, "https://mine.blob.core.cloudapi.de"),
        ({"CONNECTION_STRING": "BlobEndpoint=https://mine.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=planted"}, "https://mine.blob.core.windows.net"),
        ({"CONNECTION_STRING": "BlobEndpoint=http://127.0.0.1:1/mine/;SharedAccessSignature=sv=1&sig=planted"}, "http://127.0.0.1:1/mine"),
        ({"CONNECTION_STRING": "BlobEndpoint=http://127.0.0.1:1/mine;SharedAccessSignature=sig=planted", "ACCOUNT_NAME": "mine"}, "http://127.0.0.1:1/mine"),
        ({"CONNECTION_STRING": "BlobEndpoint=https://example.com;SharedAccessSignature=sig=planted", "ACCOUNT_NAME": "mine"}, "https://example.com"),
    ],
)  # fmt: skip
def test_what_variables_say(monkeypatch, variables, endpoint):
    for name, value in variables.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    account = account_of("az://models/m", "", is_anonymous=False)
    assert (account.name, account.endpoint) == ("mine", endpoint)
    assert bool(account.sas_token) == ("SharedAccessSignature" in str(variables))
    assert not PLANTED.search(repr(account))


@pytest.mark.parametrize(
    ("uri", "variables", "words"),
    [
        ("az://models/m", {}, "names no storage account; set AZURE_STORAGE_ACCOUNT_NAME"),
        ("az:///m", {}, "names no container"),
        ("az://Models/m", {}, "names no container"),
        ("https://mine.blob.core.windows.net/", {}, "names no container"),
        ("abfss://models@nowhere/m", {}, "no account of Azure"),
        ("az://models/m", {"ACCOUNT_NAME": "mine", "ACCOUNT_KEY": "planted!"}, "ACCOUNT_KEY .not shown. is no key"),
        ("az://models/m", {"ACCOUNT_NAME": "mine", "SAS_TOKEN": "planted"}, "SAS_TOKEN .not shown. is no SAS"),
        ("az://models/m", {"ACCOUNT_NAME": "mine", "SAS_TOKEN": "sig=planted\r\nX: y"}, "SAS_TOKEN .not shown. is no SAS"),
        ("az://models/m", {"ACCOUNT_NAME": "Mine"}, "AZURE_STORAGE_ACCOUNT_NAME names account Mine, .* lower case; give mine"),
        ("abfss://models@mine.dfs.core.windows.net/m", {"ACCOUNT_NAME": "Mine", "SAS_TOKEN": "sig=planted"}, "lower case; give mine"),
        ("az://models/m", {"CONNECTION_STRING": f"AccountName=MINE;AccountKey={PLANTED_KEY}"}, "CONNECTION_STRING names account MINE"),
        ("az://models/m", {"CONNECTION_STRING": "planted"}, "CONNECTION_STRING .not shown. is none"),
        ("az://models/m", {"CONNECTION_STRING": "AccountName=mine;BlobEndpoint=planted"}, "BlobEndpoint that is no address"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_unseen(open_store, monkeypatch, uri, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    with pytest.raises(SettingsError, match=words) as caught:
        open_store(uri)
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


OF_MINE = {"ACCOUNT_NAME": "mine", "SAS_TOKEN": "sig=planted", "ACCOUNT_KEY": PLANTED_KEY}
SAS_OF_OTHER = {"CONNECTION_STRING": "AccountName=other;SharedAccessSignature=sig=other"}


@pytest.mark.parametrize(
    ("variables", "host", "sas_token", "has_key"),
    [
        pytest.param(OF_MINE, "mine.blob.core.windows.net", "sig=planted", False, id="of-the-account"),
        pytest.param(OF_MINE, "", "sig=planted", False, id="of-the-account-of-az"),
        pytest.param(OF_MINE, "other.blob.core.windows.net", "", False, id="of-another-account"),
        pytest.param({**OF_MINE, "SAS_TOKEN": ""}, "other.dfs.core.windows.net", "", False, id="key-of-another"),
        pytest.param(OF_MINE | SAS_OF_OTHER, "other.dfs.core.windows.net", "sig=other", False, id="connection-string"),
        pytest.param({"ACCOUNT_KEY": PLANTED_KEY}, "other.dfs.core.windows.net", "", True, id="of-no-account"),
        pytest.param({"ACCOUNT_NAME": "mine", "CONNECTION_STRING": "SharedAccessSignature=sig=planted"}, "other.blob.core.windows.net", "", False, id="nameless-string"),
    ],
)  # fmt: skip
def test_credentials_of_the_environment_are_of_its_account(monkeypatch, variables, host, sas_token, has_key):
    for name, value in variables.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    account = account_of("the uri", host, is_anonymous=False)
    assert (account.sas_token, account.key is not None) == (sas_token, has_key)


def test_another_account_learns_nothing(identity, open_store, monkeypatch):
    """A uri that names any host at all is sent neither what is of another account nor a token of who asks."""
    for name, value in OF_MINE.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    uri = "abfss://models@other.blob.localhost:1/m"
    with pytest.raises(SettingsError, match=r"sent neither.*AZURE_STORAGE_ENDPOINT_SUFFIX=localhost:1") as caught:
        open_store(uri)
    assert not PLANTED.search(str(caught.value))
    assert identity.num_tokens == 0
    store = open_store(uri, azure_unsigned=True)._store
    assert "Authorization" not in store.object_request("a", {}, None).headers


@pytest.mark.parametrize(
    ("host", "variables", "is_sent"),
    [
        ("other.dfs.core.windows.net", {}, True),
        ("other.z6.blob.storage.azure.net", {}, True),
        ("other.blob.core.chinacloudapi.cn", {}, True),
        ("other.blob.core.usgovcloudapi.net", {}, True),
        ("onelake.dfs.fabric.microsoft.com", {}, True),
        ("other.blob.core.windows.net.example.com", {}, False),
        ("other.blob.example.com", {}, False),
        ("other.blob.example.com", {"ENDPOINT_SUFFIX": "example.com"}, True),
        ("other.blob.example.com", {"ENDPOINT_SUFFIX": "example.org"}, False),
        ("other.blob.example.com", {"CONNECTION_STRING": "AccountName=other;EndpointSuffix=example.com"}, True),
        ("other.blob.example.com", {"CONNECTION_STRING": "AccountName=mine;EndpointSuffix=example.com"}, False),
        ("other.blob.core.windows.net", {"CONNECTION_STRING": "AccountName=other;DefaultEndpointsProtocol=http"}, False),
        ("other.blob.example.com", {"CONNECTION_STRING": "AccountName=other;BlobEndpoint=http://127.0.0.1:1/other"}, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sas_token", ["", "sig=planted"], ids=["identity", "sas"])
def test_who_is_sent_tokens(monkeypatch, host, variables, sas_token, *, is_sent):
    for name, value in {"SAS_TOKEN": sas_token, **variables}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    if is_sent:
        account = account_of("the uri", host, is_anonymous=False)
        assert (account.key, account.sas_token) == (None, sas_token)
        return
    with pytest.raises(SettingsError, match="sent neither a SAS token of the environment nor a token") as caught:
        account_of("the uri", host, is_anonymous=False)
    assert "planted" not in str(caught.value)
    assert account_of("the uri", host, is_anonymous=False, signature="sig=own").sas_token == "sig=own"


def test_pages_of_a_listing():
    blobs = (
        "<Blob><Name>a &amp; b</Name><Properties><ResourceType>file</ResourceType></Properties></Blob>"
        "<Blob><Name>folder</Name><Properties><ResourceType>directory</ResourceType></Properties></Blob>"
        "<Blob><Name>old</Name><Metadata><hdi_isfolder>true</hdi_isfolder></Metadata></Blob>"
        '<Blob><Name Encoded="true">c%EF%BF%BE</Name></Blob><BlobPrefix><Name>sub/</Name></BlobPrefix>'
    )
    assert parse_page(listing(blobs, "next")) == ListingPage(("a & b", "c\ufffe"), "next")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"<Other/>",
        b"<EnumerationResults>",
        b"<!DOCTYPE x><EnumerationResults/>",
        listing("<Blob/>"),
        listing("", "x" * 9000),
    ],
    ids=["empty", "json", "other", "open", "doctype", "nameless", "marker"],
)
def test_listings_that_are_none(store, open_store, body):
    store.answer = lambda _: answer_bytes(200, body)
    with pytest.raises(StorageError, match="expected the keys"):
        open_store("az://models/m", azure_unsigned=True).list()
