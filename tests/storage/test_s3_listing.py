"""A listing has every key once, whatever its pages look like, and it ends."""

from __future__ import annotations

import time

import pytest

from ray_streamer.errors import StorageError, ThrottledError
from ray_streamer.storage import listing
from ray_streamer.storage.listing import ListingPage
from ray_streamer.storage.s3_listing import parse_page
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes, error_bytes, listing_bytes


@pytest.fixture
def list_of(open_s3, some_credentials):
    """A function that lists a store that answers in its way."""

    def list_of(answer, **settings):
        with HostileStore(answer) as store:
            storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, **{"retry_deadline_seconds": 0.2, **settings})
            return storage.list(), store.requests

    return list_of


def page(xml: str) -> bytes:
    return answer_bytes(200, f"<ListBucketResult>{xml}</ListBucketResult>".encode())


def test_pages_are_asked_for_one_after_the_other(list_of):
    names, requests = list_of(
        lambda asked: listing_bytes([f"m/{asked.number}"], next_token="a+b/c=" if not asked.number else "")
    )
    assert names == ["0", "1"]
    assert all(asked.is_listing and "delimiter=%2F" in asked.target for asked in requests)
    assert "continuation-token=a%2Bb%2Fc%3D" in requests[1].target
    assert all(asked.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIA") for asked in requests)
    assert all("X-Amz-Signature" not in asked.target for asked in requests)


def test_keys_that_were_not_asked_for_are_left_out(list_of):
    keys = ["m/b", "other/c", "m/sub/d", "m/e/", "m/", "m", "mm/f", "m/a", "m/a"]
    assert list_of(lambda _: listing_bytes(keys))[0] == ["a", "b"]


def test_a_page_that_broke_is_asked_for_again(list_of):
    def answer(asked):
        if asked.number == 1:
            return listing_bytes(["m/b"]).replace(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n")[
                :-20
            ]
        if asked.number == 2:
            return error_bytes(503, "SlowDown")
        return listing_bytes([f"m/{asked.number}"], next_token="" if asked.number else "next")

    names, requests = list_of(answer, retry_deadline_seconds=20)
    assert names == ["0", "3"]
    assert ["continuation-token" in asked.target for asked in requests] == [False, True, True, True]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(lambda _: listing_bytes([], next_token="same"), "repeats a continuation token", id="same-token"),
        pytest.param(
            lambda asked: listing_bytes([], next_token=str(asked.number % 3)),
            "repeats a continuation token",
            id="circle",
        ),
        pytest.param(
            lambda asked: listing_bytes([], next_token=str(asked.number)),
            "more after 200 pages and 0 keys",
            id="ever-new",
        ),
        pytest.param(lambda _: page("<IsTruncated>true</IsTruncated>"), "no usable continuation token", id="no-token"),
        pytest.param(
            lambda _: listing_bytes([], next_token="x" * 9000), "no usable continuation token", id="long-token"
        ),
        pytest.param(lambda _: page("<Contents><Size>1</Size></Contents>"), "1 entry has 0 keys", id="no-key"),
        pytest.param(lambda _: page("<Contents><Key>a</Key><Key>b</Key></Contents>"), "1 entry has 2", id="two-keys"),
        pytest.param(
            lambda _: answer_bytes(200, b"<html><body>Log in</body></html>"), "no ListBucketResult", id="html"
        ),
        pytest.param(lambda _: error_bytes(200, "InternalError"), "no ListBucketResult", id="error-with-status-200"),
        pytest.param(lambda _: answer_bytes(200), "no XML", id="nothing"),
        pytest.param(lambda _: answer_bytes(200, b"{}"), "no XML", id="json"),
        pytest.param(lambda _: page("<a>" * 100 + "</a>" * 100), "no ListBucketResult", id="deep"),
        pytest.param(
            lambda _: answer_bytes(200, b"<!DOCTYPE a [<!ENTITY e 'x'>]><ListBucketResult>&e;</ListBucketResult>"),
            "a document type",
            id="document-type",
        ),
        pytest.param(
            lambda _: answer_bytes(200, "<!DOCTYPE a><ListBucketResult/>".encode("utf-16")),
            "a document type",
            id="utf-16",
        ),
        pytest.param(
            lambda _: answer_bytes(200, b"<ListBucketResult/>", {"Content-Encoding": "gzip"}),
            "Content-Encoding",
            id="gzip",
        ),
        pytest.param(lambda _: answer_bytes(206, b"x"), "no XML", id="another-status"),
        pytest.param(lambda _: answer_bytes(200, b" " * (5 << 20)), "a page of more than 4 MiB", id="too-long"),
    ],
)
def test_what_is_no_listing(list_of, answer, words):
    with pytest.raises(StorageError, match=words) as caught:
        list_of(answer)
    assert "listing s3://bucket/m" in str(caught.value)


def test_pages_that_take_too_long(list_of):
    def answer(asked):
        store.wait(0.3)
        return listing_bytes([], next_token=str(asked.number))

    with HostileStore(answer) as store, pytest.raises(StorageError, match=r"no end in 0.5 s \(list_timeout_seconds\)"):
        list_of(answer, list_timeout_seconds=0.5)


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "18"}], ids=["at-once", "later"])
def test_a_page_is_asked_for_again_within_the_limit_of_the_listing(list_of, headers):
    began = time.monotonic()
    with pytest.raises(ThrottledError, match=r"later than list_timeout_seconds=0\.5 allows"):
        list_of(
            lambda _: error_bytes(503, "SlowDown", headers=headers), list_timeout_seconds=0.5, retry_deadline_seconds=60
        )
    assert time.monotonic() - began < 10


def test_a_page_is_not_asked_for_again_when_time_is_up(list_of):
    def leave(_):
        time.sleep(0.3)

    with pytest.raises(StorageError, match=r"attempt 1, and .* later than list_timeout_seconds=0\.1 allows"):
        list_of(leave, list_timeout_seconds=0.1, retry_deadline_seconds=60)


def test_keys_without_end(list_of, monkeypatch):
    monkeypatch.setattr(listing, "_MAX_KEYS", 50)
    with pytest.raises(
        StorageError, match="there is more after 6 pages and 60 keys; is this the folder of one checkpoint"
    ):
        list_of(lambda asked: listing_bytes(["m/k"] * 10, next_token=str(asked.number)))
    monkeypatch.setattr(listing, "_MAX_KEYS", 1000)
    monkeypatch.setattr(listing, "_MAX_KEY_CHARS", 5000)
    with pytest.raises(StorageError, match="there is more after 6 pages and 6 keys"):
        list_of(lambda asked: listing_bytes(["m/" + "k" * 998], next_token=str(asked.number)))


@pytest.mark.parametrize(
    ("xml", "keys"),
    [
        ("<Contents><Key>a&amp;b&#x1F600;</Key></Contents>", ("a&b\U0001f600",)),
        ("<EncodingType>url</EncodingType><Contents><Key>a+b%2B%C3%BC</Key></Contents>", ("a b+ü",)),
        ("<Contents><Owner><Key>x</Key></Owner><Key><![CDATA[a<b]]></Key></Contents>", ("a<b",)),
        ("<CommonPrefixes><Prefix>sub/</Prefix></CommonPrefixes><IsTruncated>false</IsTruncated>", ()),
        ("<NextContinuationToken>old</NextContinuationToken>", ()),
    ],
)
def test_what_a_page_says(xml, keys):
    for root in ("ListBucketResult", "s3:ListBucketResult"):
        body = f"<?xml version='1.0' encoding='UTF-8'?>\n<{root} xmlns:s3='http://x/'>{xml}</{root}>"
        assert parse_page(body.encode()) == ListingPage(keys, "")
