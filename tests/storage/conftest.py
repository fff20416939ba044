"""Places in buckets to write to, and storages that are closed afterwards."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from botocore.loaders import JSONFileLoader

from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.faults import FaultProxy

# Assertions of the shared suite are explained as those of tests are.
pytest.register_assert_rewrite("ray_streamer.testing.storage_suite")

_numbers = itertools.count()


@dataclass
class BucketPlace:
    """A prefix in a bucket, to which a client of boto3 writes."""

    uri: str
    client: Any
    bucket: str
    prefix: str

    def write(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}".lstrip("/"), Body=content)


@pytest.fixture(scope="session", autouse=True)
def descriptions_are_parsed_once():
    """Hundreds of clients of boto3 are made here, and each would parse its descriptions of S3 anew."""
    parse = JSONFileLoader.load_file
    parse_once = functools.cache(lambda path: parse(JSONFileLoader(), path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _, path: parse_once(path))
        yield


@pytest.fixture
def only_on_the_gateway(s3_server):
    if s3_server.kind != "rgw":
        pytest.skip("moto believes everybody, counts nothing and keeps no connection")


@pytest.fixture(scope="session")
def boto3_client(s3_server):
    client = s3_server.client()
    client.create_bucket(Bucket="storage-tests")
    yield client
    client.close()


@pytest.fixture
def place(boto3_client, s3_credentials):
    prefix = f"prefix {next(_numbers)}/llama+ü"
    return BucketPlace(f"s3://storage-tests/{prefix}", boto3_client, "storage-tests", prefix)


@pytest.fixture
def proxy(s3_server):
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def etag(place):
    from ray_streamer.testing.storage_suite import CONTENT  # not before its assertions are registered, above

    place.write("a", CONTENT)
    return place.client.head_object(Bucket=place.bucket, Key=f"{place.prefix}/a")["ETag"]


@pytest.fixture
def open_store():
    """A function that opens a storage for the length of a test."""
    opened = []

    def open_store(uri, **settings):
        named = NamedCheckpoint.of(uri, Settings.resolve(**{"retry_deadline_seconds": 2.0, **settings}))
        opened.append(open_storage(named.uri, named.settings))
        return opened[-1]

    yield open_store
    for storage in opened:
        storage.close()


@pytest.fixture
def open_s3(open_store):
    """The same, with more time for requests that fail."""
    return partial(open_store, retry_deadline_seconds=5.0)


@pytest.fixture
def some_credentials(monkeypatch):
    """Keys, for stores that do not look at them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTEDKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTEDSECRET")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "PLANTEDTOKEN/with+signs==")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
