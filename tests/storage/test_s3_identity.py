"""No bytes of another version of an object are taken, however much or little a store says about versions."""

from __future__ import annotations

import logging
import random
import re

import pytest

from ray_streamer.errors import ObjectChangedError, ObjectMissingError, ShortReadError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.identity import Identity
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes, error_bytes, part_of
from ray_streamer.testing.storage_suite import read

CONTENT = random.Random(5).randbytes(100_000)
TUESDAY, WEDNESDAY = "Tue, 03 Nov 2026 10:00:00 GMT", "Wed, 04 Nov 2026 10:00:00 GMT"
HEAD, REST = Extent(0, 1000), Extent(1000, len(CONTENT))


@pytest.fixture
def load(open_s3, some_credentials):
    """A function that reads a head and the rest of an object, from a store that answers in its way."""

    def load(answer):
        with HostileStore(answer) as store:
            storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, retry_deadline_seconds=0.5)
            head, info = storage.read_head("a", HEAD.num_bytes)
            return head + read(storage, "a", REST, info.etag), store

    return load


def in_turn(first, later):
    """A store whose headers change after the first answer."""
    return lambda asked: part_of(CONTENT, asked, first if asked.number == 0 else later)


@pytest.mark.parametrize(
    ("first", "later", "words"),
    [
        pytest.param({}, {"ETag": '"f"'}, 'ETag "f", not "e"', id="another-etag"),
        pytest.param({}, {"ETag": None}, "the answer has no ETag", id="etag-gone"),
        pytest.param({}, {"ETag": '""'}, "the answer has no ETag", id="etag-empty"),
        pytest.param(
            {},
            {"Content-Range": "bytes 1000-99999/100007"},
            "97.7 KiB \\(100007 bytes\\), not 97.7 KiB \\(100000 bytes\\)|97.7 KiB \\(100007 bytes\\) now",
            id="size",
        ),
        pytest.param({"ETag": 'W/"e"'}, {"ETag": 'W/"f"'}, 'ETag W/"f", not W/"e"', id="another-weak-etag"),
        pytest.param({"ETag": 'W/"e"'}, {"ETag": None}, "the answer has no ETag", id="weak-etag-gone"),
        pytest.param(
            {"ETag": 'W/"e"'},
            {"ETag": 'W/"e"', "Content-Range": "bytes 1000-99999/100007"},
            r"97.7 KiB \(100007 bytes\), not 97.7 KiB \(100000 bytes\)",
            id="size-with-a-weak-etag",
        ),
        pytest.param(
            {"ETag": 'W/"e"', "Last-Modified": TUESDAY},
            {"ETag": 'W/"e"', "Last-Modified": WEDNESDAY},
            "another Last-Modified",
            id="date-with-a-weak-etag",
        ),
        pytest.param(
            {"ETag": None},
            {"ETag": None, "Content-Range": "bytes 1000-99999/100007"},
            r"97.7 KiB \(100007 bytes\), not 97.7 KiB \(100000 bytes\)",
            id="size-without-etag",
        ),
        pytest.param(
            {"ETag": None, "Last-Modified": TUESDAY},
            {"ETag": None, "Last-Modified": WEDNESDAY},
            "another Last-Modified",
            id="date-without-etag",
        ),
        pytest.param(
            {"ETag": None, "Last-Modified": TUESDAY}, {"ETag": None}, "no Last-Modified", id="date-without-etag-gone"
        ),
    ],
)
def test_another_version_is_noticed(load, first, later, words):
    with pytest.raises(ObjectChangedError, match=words) as caught:
        load(in_turn(first, later))
    assert "s3://bucket/m/a" in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        pytest.param({"ETag": None, "Last-Modified": TUESDAY}, "no ETag.*size and Last-Modified", id="no-etag"),
        pytest.param({"ETag": None}, "no ETag.*size of every", id="nothing"),
        pytest.param({"ETag": 'W/"e"'}, "a weak ETag.*size of every", id="weak-etag"),
        pytest.param({"ETag": '""', "Last-Modified": "some time ago"}, "no ETag.*size of every", id="empty-etag"),
        pytest.param({"ETag": "*"}, "no ETag", id="etag-that-means-any"),
    ],
)
def test_what_cannot_be_known_is_said_once(load, caplog, headers, words):
    content, store = load(in_turn(headers, headers))
    assert content == CONTENT
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage().startswith("s3://bucket/m/a has ")
    assert caplog.text.count("so the store does not tell") == 1
    assert re.search(words, caplog.text)
    assert all("if-match" not in asked.headers for asked in store.requests)


@pytest.mark.parametrize(
    "later",
    [
        pytest.param({"ETag": 'W/"e"'}, id="a-proxy-made-the-etag-weak"),
        pytest.param({"Last-Modified": WEDNESDAY}, id="dates-mean-nothing-beside-an-etag"),
        pytest.param({"Content-Range": "BYTES 1000-99999/100000"}, id="unit-in-capitals"),
        pytest.param({"Content-Encoding": "identity"}, id="no-encoding"),
        pytest.param({"Content-Encoding": "aws-chunked"}, id="framing-of-the-upload"),
    ],
)
def test_the_same_version_is_taken(load, later):
    assert load(in_turn({"Last-Modified": TUESDAY}, later))[0] == CONTENT


@pytest.mark.parametrize("etag", ['"e"', '"ü\xe9"', "unquoted", '"a b"', '"e", "f"', '"' + "e" * 3000 + '"'])
def test_odd_etags(load, etag):
    content, store = load(in_turn({"ETag": etag}, {"ETag": etag}))
    assert content == CONTENT
    assert store.requests[1].headers.get("if-match") in (None, etag)
    with pytest.raises(ObjectChangedError):
        load(in_turn({"ETag": etag}, {"ETag": '"other"'}))


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Range": "bytes 1001-99999/100000"}, "other bytes"),
        ({"Content-Range": "bytes 0-98999/100000"}, "other bytes"),
        ({"Content-Range": "bytes 1000-99998/100000"}, "other bytes|announced"),
        ({"Content-Range": "bytes 1000-99999/*"}, "expected 206 with a Content-Range"),
        ({"Content-Range": "bytes 1000-99999/50000"}, "expected 206 with a Content-Range"),
        ({"Content-Range": "bytes 1000-99999/" + "9" * 5000}, "expected 206 with a Content-Range"),
        (
            {"Content-Range": None, "Content-Type": "multipart/byteranges; boundary=x"},
            "expected 206 with a Content-Range",
        ),
        (
            {"Content-Range": "bytes 1000-99999/100000\r\nContent-Range: bytes 0-9/10"},
            "expected 206 with a Content-Range",
        ),
        ({"Content-Encoding": "gzip"}, "Content-Encoding 'gzip'.*without that header"),
        ({"Content-Encoding": "br, identity"}, "Content-Encoding 'br, identity'"),
    ],
)
def test_other_bytes_are_refused(load, headers, words):
    with pytest.raises(StorageError, match=words) as caught:
        load(in_turn({}, headers))
    assert type(caught.value) is StorageError
    assert len(str(caught.value)) < 1000


def chunked(body: bytes) -> bytes:
    parts = [body[start : start + 7000] for start in range(0, len(body), 7000)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("num_excess", [0, 1, 100_000])
@pytest.mark.parametrize("framing", [{"Transfer-Encoding": "chunked"}, {"Connection": "close"}])
def test_a_body_without_a_length_is_as_long_as_its_range(load, framing, num_excess):
    def answer(asked):
        if asked.number == 0:
            return part_of(CONTENT, asked)
        headers = {"Content-Range": f"bytes 1000-99999/{len(CONTENT)}", "ETag": '"e"', "Content-Length": None}
        body = CONTENT[1000:] + bytes(num_excess)
        return answer_bytes(206, b"", {**headers, **framing}) + (chunked(body) if "Connection" not in framing else body)

    if not num_excess:
        assert load(answer)[0] == CONTENT
        return
    with pytest.raises(
        StorageError, match=r"the body is longer than the 96.7 KiB \(99000 bytes\) of its Content-Range"
    ):
        load(answer)


def test_a_store_that_refuses_its_own_etag_is_gone_around(load, caplog):
    def answer(asked):
        return error_bytes(412, "PreconditionFailed") if "if-match" in asked.headers else part_of(CONTENT, asked)

    content, store = load(answer)
    assert content == CONTENT
    assert caplog.text.count("refuses If-Match with the ETag that it gives") == 1
    # head, refused, look, rest
    assert [asked.extent for asked in store.requests] == [HEAD, REST, Extent(0, 1), REST]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"ETag": '"f"'}, 'PreconditionFailed.*the store says now: ETag "f", not "e"'),
        ({"ETag": None}, "the store says now: the answer has no ETag"),
        ({"Content-Range": "bytes 0-0/7"}, "the store says now: 7 bytes, not 97.7 KiB"),
    ],
)
def test_a_store_that_refuses_rightly_is_believed(load, now, words):
    def answer(asked):
        if "if-match" in asked.headers:
            return error_bytes(412, "PreconditionFailed")
        return part_of(CONTENT, asked, now if asked.number else {})

    with pytest.raises(ObjectChangedError, match=words):
        load(answer)


def test_a_store_that_does_not_know_conditions_is_gone_around(load):
    def answer(asked):
        return error_bytes(501, "NotImplemented") if "if-match" in asked.headers else part_of(CONTENT, asked)

    assert load(answer)[0] == CONTENT


@pytest.mark.parametrize(("content", "error_class"), [(b"", ObjectChangedError), (None, ObjectMissingError)])
def test_an_object_that_is_gone_when_it_is_looked_at(load, content, error_class):
    def answer(asked):
        if "if-match" in asked.headers:
            return error_bytes(412, "PreconditionFailed")
        if asked.number == 0:
            return part_of(CONTENT, asked)
        return error_bytes(404, "NoSuchKey") if content is None else part_of(content, asked)

    with pytest.raises(error_class):
        load(answer)


def test_without_conditions_every_answer_is_compared(load):
    def answer(asked):
        if "if-match" in asked.headers:
            return error_bytes(412, "PreconditionFailed")
        return part_of(CONTENT, asked, {"ETag": '"f"'} if asked.number == 3 else {})

    with pytest.raises(ObjectChangedError, match='ETag "f"'):
        load(answer)


@pytest.mark.parametrize("is_ranged", [True, False])
def test_an_object_without_bytes(open_s3, some_credentials, is_ranged):
    """Some stores answer 416 to its first byte, some 200 with nothing."""

    def answer(asked):
        if is_ranged and asked.extent is not None:
            return error_bytes(416, "InvalidRange")
        return answer_bytes(200, b"", {"ETag": '"e"'})

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url)
        head, info = storage.read_head("a", 10)
        assert (head, info.size_bytes, info.etag) == (b"", 0, '"e"')
        with pytest.raises(ShortReadError):
            read(storage, "a", Extent(0, 1), info.etag)


def test_a_head_goes_on_where_it_broke(some_credentials, open_s3):
    def answer(asked):
        if asked.number == 0:
            return part_of(CONTENT, asked, {"Connection": "close"})[:-400]
        return part_of(CONTENT, asked)

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url)
        assert storage.read_head("a", 1000)[0] == CONTENT[:1000]
        assert [asked.extent for asked in store.requests] == [HEAD, Extent(600, 1000)]
        assert store.requests[1].headers["if-match"] == '"e"'


def test_a_head_of_two_versions_is_refused(some_credentials, open_s3):
    def answer(asked):
        if asked.number == 0:
            return part_of(CONTENT, asked, {"Connection": "close"})[:-400]
        return part_of(CONTENT[::-1], asked, {"ETag": '"f"'})

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url)
        with pytest.raises(ObjectChangedError):
            storage.read_head("a", 1000)


@pytest.mark.parametrize(
    "identity",
    [
        Identity('"e"', 7, 8),
        Identity('W/"size=3 modified=4"', 7, None),
        Identity("", 0, 0),
        Identity("", 1 << 60, None),
        Identity('W/"e"', 5, 1_700_000_000),
    ],
)
def test_identities_travel_as_text(identity):
    parsed = Identity.parse(identity.token)
    assert parsed.token == identity.token
    assert identity.difference(parsed) == parsed.difference(identity) == ""
    assert parsed == (Identity('"e"') if identity.is_exact else identity)


@pytest.mark.parametrize("digits", [19, 20, 5000])
@pytest.mark.parametrize("form", ["size={} modified=", "size=7 modified={}", '"e" size={} modified={}'])
def test_an_etag_that_looks_like_an_identity_without_one(load, form, digits):
    """A store may call an object whatever it likes; either that is an ETag like any other, or another object is found."""
    etag = form.replace("{}", "1" * digits)
    try:
        assert load(lambda asked: part_of(CONTENT, asked, {"ETag": etag}))[0] == CONTENT
    except ObjectChangedError:
        assert digits < 20
