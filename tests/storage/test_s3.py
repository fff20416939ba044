"""The S3 backend keeps the contract against a real server, and lives through what networks and stores do."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import ray_streamer
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
from ray_streamer.settings import Settings
from ray_streamer.storage import s3_client
from ray_streamer.storage.s3_client import SignedUrls
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.testing.storage_suite import CONTENT, StorageContract, read, write_llama


class TestS3Contract(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place


WHOLE = Extent(0, len(CONTENT))


def test_etag_is_kept_as_sent(place, open_s3, etag):
    storage = open_s3(place.uri)
    assert storage.read_head("a", 1)[1].etag == storage.size_and_etag("a").etag == etag
    assert etag.startswith('"')


def test_whole_bucket(place, open_s3):
    place.client.create_bucket(Bucket="whole-bucket")
    place.client.put_object(Bucket="whole-bucket", Key="a", Body=b"abc")
    place.client.put_object(Bucket="whole-bucket", Key="sub/b", Body=b"def")
    for uri in ("s3://whole-bucket", "s3://whole-bucket/"):
        storage = open_s3(uri)
        assert (storage.list(), storage.list("sub/")) == (["a"], ["sub/b"])
        assert storage.read_head("sub/b", 2)[0] == b"de"


def test_multipart_object(place, open_s3):
    key = {"Bucket": place.bucket, "Key": f"{place.prefix}/parts"}
    upload = place.client.create_multipart_upload(**key)["UploadId"]
    first = bytes(5 << 20)
    parts = [
        {"PartNumber": n, "ETag": place.client.upload_part(**key, UploadId=upload, PartNumber=n, Body=body)["ETag"]}
        for n, body in ((1, first), (2, CONTENT))
    ]
    place.client.complete_multipart_upload(**key, UploadId=upload, MultipartUpload={"Parts": parts})
    storage = open_s3(place.uri)
    info = storage.size_and_etag("parts")
    assert info.etag.endswith('-2"')
    extent = Extent(len(first) - 10, len(first) + len(CONTENT))
    assert read(storage, "parts", extent, info.etag) == bytes(10) + CONTENT


def test_more_than_one_page_of_names(place, open_s3):
    names = [f"part-{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: place.write(name, b"x"), names))
    assert open_s3(place.uri).list() == names


def test_folder_markers_are_not_files(place, open_s3):
    place.write("", b"")
    place.write("sub/", b"")
    place.write("a", b"x")
    storage = open_s3(place.uri + "/")
    assert storage.list() == ["a"]
    assert storage.list("sub/") == []


def test_a_prefix_that_does_not_exist_is_empty(place, open_s3):
    assert open_s3(place.uri + "/nowhere").list() == []


@pytest.mark.usefixtures("only_on_the_gateway")
def test_each_byte_is_sent_once(s3_server, place, open_s3, etag):
    storage = open_s3(place.uri)
    before = s3_server.requests(), s3_server.bytes_sent()
    extents = [Extent(start, min(start + 100_000, len(CONTENT))) for start in range(0, len(CONTENT), 100_000)]
    for extent in extents:
        read(storage, "a", extent, etag)
    assert s3_server.bytes_sent() - before[1] == len(CONTENT)
    assert s3_server.requests() - before[0] == len(extents)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_connections_are_kept(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    for start in range(20):
        read(storage, "a", Extent(start, start + 1000), etag)
    assert (len(proxy.ranges), proxy.num_connections) == (20, 1)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_a_refused_request_keeps_its_connection(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    for _ in range(3):
        with pytest.raises(ObjectMissingError):
            storage.read_head("nope", 10)
        read(storage, "a", Extent(0, 10), etag)
    assert proxy.num_connections == 1


def test_an_idle_connection_that_the_server_closed_is_replaced(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=0)
    read(storage, "a", Extent(0, 10), etag)
    proxy.drop_connections()
    assert read(storage, "a", Extent(5, 15), etag) == CONTENT[5:15]
    assert proxy.num_connections == 2


@pytest.mark.parametrize("end", ["close", "reset", "stall"])
@pytest.mark.parametrize("body_bytes", [0, 1, 100_000, 600_000])
def test_a_broken_body_is_resumed(place, open_s3, etag, proxy, end, body_bytes):
    # On a busy machine the server itself may be silent for a moment.
    timeouts = {"stall_timeout_seconds": 1.0} if end == "stall" else {}
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, **timeouts)
    proxy.fail_next(Fault(body_bytes=body_bytes, end=end))
    assert read(storage, "a", WHOLE, etag) == CONTENT
    assert len(proxy.ranges) == 2
    resumed_at = int(proxy.ranges[1].removeprefix("bytes=").partition("-")[0])
    # A reset also throws away what the kernel had received and not handed over.
    assert resumed_at == body_bytes or (end == "reset" and resumed_at < body_bytes)


def test_a_body_that_breaks_again_and_again_is_finished(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(*[Fault(body_bytes=100_000)] * 5)
    assert read(storage, "a", WHOLE, etag) == CONTENT
    assert [int(value.removeprefix("bytes=").partition("-")[0]) for value in proxy.ranges] == [
        100_000 * attempt for attempt in range(6)
    ]


def test_a_fault_after_the_last_byte_asks_for_nothing(place, open_s3, etag, proxy, monkeypatch):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    receive_into = storage._http.receive_into

    def receive_and_fail(answer, buffer):
        receive_into(answer, buffer)
        raise ConnectionResetError

    monkeypatch.setattr(storage._http, "receive_into", receive_and_fail)
    assert read(storage, "a", WHOLE, etag) == CONTENT
    assert len(proxy.ranges) == 1


def test_a_broken_head_is_read_again(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(Fault(body_bytes=100), Fault(status=500, code="InternalError"))
    head, info = storage.read_head("a", 100_000)
    assert (head, info.etag) == (CONTENT[:100_000], etag)


def test_changed_while_a_body_is_resumed(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(Fault(status=503))
    place.write("a", CONTENT[::-1])
    with pytest.raises(ObjectChangedError):
        read(storage, "a", WHOLE, etag)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (502, ""),
        (504, ""),
        (520, ""),
        (522, ""),
        (524, ""),
    ],
)
def test_passing_faults_pass(place, open_s3, etag, proxy, status, code):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(*[Fault(status=status, code=code)] * 3)
    assert read(storage, "a", WHOLE, etag) == CONTENT
    assert len(proxy.ranges) == 4


@pytest.mark.parametrize(
    ("fault", "error_class", "words"),
    [
        (Fault(status=503), ThrottledError, "slow down.*HTTP 503 SlowDown, request id proxy-1"),
        (Fault(status=500, code="InternalError"), StorageError, "HTTP 500 InternalError"),
        (Fault(body_bytes=0), StorageError, r"ended at byte 0"),
        (Fault(body_bytes=0, end="reset"), StorageError, "Connection reset by peer"),
    ],
)
def test_faults_that_do_not_pass(place, open_s3, etag, proxy, fault, error_class, words):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=0.3)
    proxy.fail_next(*[fault] * 1000)
    with pytest.raises(StorageError, match=words) as caught:
        read(storage, "a", WHOLE, etag)
    assert type(caught.value) is error_class
    for part in (f"{place.uri}/a", str(WHOLE), f"attempt {len(proxy.ranges)}", "retry_deadline_seconds is 0.3"):
        assert part in str(caught.value)
    assert len(proxy.ranges) > 1


def test_no_retry_when_the_deadline_is_zero(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=0)
    proxy.fail_next(Fault(status=503))
    with pytest.raises(ThrottledError):
        read(storage, "a", WHOLE, etag)
    assert len(proxy.ranges) == 1


def test_permanent_refusals_are_not_tried_again(place, open_s3, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    with pytest.raises(ObjectMissingError):
        storage.read_head("nope", 10)
    assert len(proxy.ranges) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=200), "expected 206.*ignores ranges"),
        (Fault(headers=(("content-range", "bytes 1-589947/589948"),)), "answered with other bytes"),
        (Fault(headers=(("content-range", "bytes 0-99/*"),)), "expected 206 with a Content-Range"),
        (Fault(status=418, code="Teapot"), "refused.*HTTP 418 Teapot"),
        (
            Fault(status=301, code="PermanentRedirect", headers=(("x-amz-bucket-region", "eu-west-9"),)),
            "in region eu-west-9; set s3_region.*HTTP 301 PermanentRedirect",
        ),
        # The answer to a signature for another region names the right one in its body.
        (Fault(status=400, code="Malformed</Code><Region>eu-west-9</Region><Code>"), "in region eu-west-9"),
    ],
)
def test_answers_that_mean_nothing_are_refused(place, open_s3, etag, proxy, fault, words):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(fault)
    with pytest.raises(StorageError, match=words) as caught:
        read(storage, "a", WHOLE, etag)
    assert type(caught.value) is StorageError
    assert len(proxy.ranges) == 1


def test_a_server_that_overlooks_if_match_is_noticed(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(Fault(headers=(("etag", '"another"'),)))
    with pytest.raises(ObjectChangedError, match='ETag "another"'):
        read(storage, "a", WHOLE, etag)


def test_an_expired_signature_is_renewed_once(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    read(storage, "a", Extent(0, 1), etag)
    proxy.fail_next(Fault(status=403, code="AccessDenied"))
    assert read(storage, "a", WHOLE, etag) == CONTENT
    proxy.fail_next(*[Fault(status=400, code="ExpiredToken")] * 2)
    with pytest.raises(AccessError, match="ExpiredToken"):
        read(storage, "a", WHOLE, etag)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_a_signature_that_expired_early_is_renewed(place, open_s3, etag, monkeypatch):
    """As when the credentials that signed it end before it does."""
    monkeypatch.setattr(s3_client, "_SIGNED_FOR_SECONDS", 1)
    monkeypatch.setattr(s3_client, "time", SimpleNamespace(monotonic=lambda: 0.0))
    storage = open_s3(place.uri)
    assert read(storage, "a", Extent(0, 5), etag) == CONTENT[:5]
    time.sleep(2.1)  # the server's clock decides, in whole seconds
    assert read(storage, "a", Extent(5, 9), etag) == CONTENT[5:9]


def test_signed_urls_are_renewed_at_half_of_their_life(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signed = []

    def sign(key, seconds):
        signed.append((key, seconds))
        return f"url {len(signed)}"

    urls = SignedUrls(sign)
    assert [urls.url_of("a"), urls.url_of("b"), urls.url_of("a")] == ["url 1", "url 2", "url 1"]
    now[0] = 1799.0
    assert urls.url_of("a") == "url 1"
    now[0] = 1800.0
    assert urls.url_of("a") == "url 3"
    urls.discard("a", "url 1")
    assert urls.url_of("a") == "url 3"
    urls.discard("a", "url 3")
    assert urls.url_of("a") == "url 4"
    assert signed[0] == ("a", 3600)


SECRET = "notthesecretkeynotthesecretkey"


@pytest.mark.usefixtures("only_on_the_gateway")
@pytest.mark.parametrize(
    ("access_key", "words"),
    [("unknownaccesskey", "InvalidAccessKeyId"), ("testaccesskey", "AccessDenied|SignatureDoesNotMatch")],
)
def test_wrong_credentials(place, open_s3, etag, monkeypatch, access_key, words):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = open_s3(place.uri)
    for ask in (
        lambda: storage.size_and_etag("a"),
        lambda: storage.read_head("a", 8),
        lambda: read(storage, "a", Extent(0, 8), etag),
        lambda: storage.list(),
    ):
        with pytest.raises(AccessError, match=words) as caught:
            ask()
        assert place.uri in str(caught.value)
        assert_no_secret(caught.value, access_key)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_wrong_credentials_are_no_missing_files(s3_credentials, tmp_path, monkeypatch, caplog):
    """The first refusal is the error: nothing is said of files that may not exist, nor of rights to list."""
    write_llama(tmp_path)
    uri = s3_credentials.upload_folder(tmp_path, "storage-tests", "wrong")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknownaccesskey")
    for ask in (ray_streamer.plan, ray_streamer.ls):
        with pytest.raises(CredentialsError, match=r"InvalidAccessKeyId.*check the access key"):
            ask(uri, settings=Settings(retry_deadline_seconds=1))
    assert "ListBucket" not in caplog.text


def assert_no_secret(error: BaseException | None, access_key: str) -> None:
    while error is not None:
        for text in (str(error), repr(error), str(getattr(error, "args", ""))):
            assert SECRET not in text
            assert access_key not in text
            assert "Signature=" not in text
        error = error.__cause__ or error.__context__


def test_no_credentials(place, open_s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    storage = open_s3(place.uri)
    for ask in (lambda: storage.read_head("a", 8), lambda: storage.list()):
        with pytest.raises(AccessError, match=r"AWS_ACCESS_KEY_ID.*s3_unsigned=True"):
            ask()


def test_unknown_profile(open_s3):
    with pytest.raises(AccessError, match=r"nobody.*s3_profile"):
        open_s3("s3://bucket/a", s3_profile="nobody")


@pytest.mark.usefixtures("only_on_the_gateway")
def test_unsigned(place, open_s3, etag, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    storage = open_s3(place.uri, s3_unsigned=True)
    with pytest.raises(AccessError, match="HTTP 403 AccessDenied"):
        storage.size_and_etag("a")
    place.client.put_object_acl(Bucket=place.bucket, Key=f"{place.prefix}/a", ACL="public-read")
    assert read(storage, "a", WHOLE, storage.size_and_etag("a").etag) == CONTENT


def test_missing_bucket(s3_credentials, open_s3):
    storage = open_s3("s3://no-such-bucket/llama")
    for ask in (
        lambda: storage.size_and_etag("a"),
        lambda: storage.list(),
        lambda: read(storage, "a", Extent(0, 1), ""),
    ):
        with pytest.raises(ObjectMissingError, match=r"no such bucket.*s3://no-such-bucket.*NoSuchBucket"):
            ask()


@pytest.mark.usefixtures("s3_credentials")
def test_wrong_endpoint_fails_at_once(open_s3, dead_port):
    endpoint = f"http://127.0.0.1:{dead_port}"
    storage = open_s3("s3://bucket/llama", s3_endpoint_url=endpoint, retry_deadline_seconds=600)
    for ask in (lambda: storage.size_and_etag("a"), lambda: storage.list()):
        with pytest.raises(StorageError, match=rf"{endpoint}.*s3_endpoint_url") as caught:
            ask()
        assert type(caught.value) is StorageError


@pytest.mark.usefixtures("s3_credentials")
def test_an_endpoint_that_answered_before_may_come_back(s3_server, place, open_s3, etag):
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=0.3)
        read(storage, "a", Extent(0, 1), etag)
        proxy.drop_connections()
    with pytest.raises(StorageError, match=r"Connection refused.*retry_deadline_seconds is 0.3"):
        read(storage, "a", Extent(0, 1), etag)


@pytest.mark.usefixtures("s3_credentials")
def test_an_endpoint_without_a_scheme(open_s3, monkeypatch):
    with pytest.raises(SettingsError, match="s3_endpoint_url='localhost:1': write http:// or https:// before the host"):
        open_s3("s3://bucket/a", s3_endpoint_url="localhost:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:1")
    with pytest.raises(SettingsError, match="write http:// or https:// before the host in AWS_ENDPOINT_URL"):
        open_s3("s3://bucket/a")


@pytest.mark.usefixtures("s3_credentials")
@pytest.mark.parametrize(
    ("name", "value"), [("AWS_CA_BUNDLE", ""), ("AWS_ENDPOINT_URL", "http://localhost:1 ")], ids=["authority", "port"]
)
def test_what_else_is_wrong_is_not_put_down_to_a_missing_scheme(open_s3, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        open_s3("s3://bucket/a")
    assert "before the host" not in str(caught.value)


@pytest.mark.usefixtures("s3_credentials")
@pytest.mark.parametrize(
    ("uri", "settings", "error_class"),
    [
        ("s3://bucket/a", {"s3_endpoint_url": "http://localhost:100000"}, SettingsError),
        ("s3://Not_A Bucket/a", {}, SettingsError),
        ("s3://bucket/a", {"s3_region": "no region"}, SettingsError),
        ("s3://bucket/a", {"s3_ca_bundle": "/no/ca.pem"}, SettingsError),
    ],
)
def test_what_boto3_refuses_is_explained(open_s3, uri, settings, error_class):
    with pytest.raises(error_class, match=r"s3://") as told:
        open_s3(uri, **settings).read_head("a", 1)
    assert "before the host" not in str(told.value)


def test_close_wakes_reads_in_flight(place, open_s3, etag, proxy):
    storage = open_s3(
        place.uri, s3_endpoint_url=proxy.url, stall_timeout_seconds=600, hedge_percent=0, retry_deadline_seconds=600
    )
    proxy.fail_next(Fault(body_bytes=1000, end="stall"))
    errors = []

    def wait_for_ever():
        try:
            read(storage, "a", WHOLE, etag)
        except StorageError as error:
            errors.append(error)

    reader = threading.Thread(target=wait_for_ever)
    reader.start()
    proxy.wait_until_stalled()
    storage.close()
    reader.join(30)
    assert not reader.is_alive()
    assert "closed" in str(errors[0])


def test_close_ends_the_wait_for_a_retry(place, open_s3, etag, proxy, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda _low, _high: 600)
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=3600)
    proxy.fail_next(*[Fault(status=503)] * 100)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, storage, "a", WHOLE, etag)
        proxy.wait_for_requests(1)
        storage.close()
        with pytest.raises(StorageError, match="closed"):
            reading.result(30)


def test_errors_name_what_was_read_and_survive_pickling(place, open_s3, etag):
    storage = open_s3(place.uri)
    place.write("a", b"other")
    with pytest.raises(ObjectChangedError) as caught:
        read(storage, "a", Extent(1, 4), etag)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ObjectChangedError
    for part in (f"{place.uri}/a [1, 4)", "412", "PreconditionFailed", "request id"):
        assert part in str(copy)
