"""What a store says when it refuses reaches the reader with its code and sentence, with advice, and without secrets."""

from __future__ import annotations

import base64
import re
import time
import traceback
from email.utils import formatdate
from urllib.parse import quote

import pytest

from ray_streamer.errors import AccessError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.redaction import Secrets
from ray_streamer.storage.refusal import seconds_until
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes, error_bytes, part_of
from ray_streamer.testing.storage_suite import read


@pytest.fixture
def refused(open_s3, some_credentials):
    """A function that gives the error of reading, or listing, a store that answers in its way."""

    def refused(answer, *, ask=lambda storage: storage.read_head("a", 8)):
        with HostileStore(answer) as store:
            storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, retry_deadline_seconds=0.2)
            with pytest.raises(StorageError) as caught:
                ask(storage)
            return caught.value

    return refused


SHORT = {"first_byte_timeout_seconds": 0.3, "stall_timeout_seconds": 0.3, "retry_deadline_seconds": 0.1}
LIST = {"ask": lambda storage: storage.list()}


@pytest.mark.parametrize(
    ("status", "code", "message", "words"),
    [
        (403, "InvalidObjectState", "The action is not valid for the object's storage class", "archived; restore it"),
        (
            403,
            "AccessDenied",
            "User: arn:aws:iam::1:user/me is not authorized to perform: kms:Decrypt",
            "kms:Decrypt on",
        ),
        (400, "KMS.DisabledException", "arn:aws:kms:eu-west-1:1:key/2 is disabled.", "kms:Decrypt on the key"),
        (403, "SecondLevelDomainForbidden", "Please use virtual hosted style to access.", "s3_addressing to virtual"),
        (403, "PathStyleDomainForbidden", "", "s3_addressing to virtual"),
        (400, "InvalidRequest", "Only virtual-hosted style requests are taken.", "s3_addressing to virtual"),
        (403, "AllAccessDisabled", "All access to this object has been disabled", "AllAccessDisabled"),
        (403, "SignatureDoesNotMatch", "The request signature we calculated does not match", "check the secret key"),
        (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist", "check the access key"),
        (409, "OperationAborted", "A conflicting operation is in progress", "OperationAborted"),
        (451, "UnavailableForLegalReasons", "", "HTTP 451"),
    ],
)
def test_code_and_message_are_repeated(refused, status, code, message, words):
    error = refused(lambda _: error_bytes(status, code, message))
    assert isinstance(error, AccessError) == (status == 403)
    for part in ("s3://bucket/m/a", f"HTTP {status} {code}", message.rstrip("."), words):
        assert part in str(error)
    assert "s3:ListBucket" not in str(error)


def test_permission_to_list_is_named_where_it_matters(refused):
    error = refused(lambda _: error_bytes(403, "AccessDenied", "Access Denied"))
    assert type(error) is AccessError
    assert "HTTP 403 AccessDenied (Access Denied)" in str(error)
    assert "without s3:ListBucket an object that does not exist looks like this, too" in str(error)
    error = refused(lambda _: error_bytes(403, "AccessDenied"), **LIST)
    assert type(error) is AccessError
    assert "listing needs s3:ListBucket" in str(error)


def test_a_redirect_names_the_endpoint(refused):
    body = b"<Error><Code>PermanentRedirect</Code><Endpoint>bucket.s3.eu-west-9.example.com</Endpoint></Error>"
    error = refused(lambda _: answer_bytes(301, body, {"Location": "http://evil.example.com/"}))
    assert "HTTP 301 PermanentRedirect" in str(error)
    assert "the store wants to be asked at bucket.s3.eu-west-9.example.com; set s3_endpoint_url or s3_region" in str(
        error
    )
    assert "evil" not in str(error)


@pytest.mark.parametrize(
    ("ahead_seconds", "words"),
    [(7270, "2 h 1 min ahead of"), (-960, "16 min behind"), (86400 * 400, "9600 h 0 min ahead of")],
)
@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "AccessDenied"])
def test_a_wrong_clock_is_told_with_its_error(refused, code, ahead_seconds, words):
    date = formatdate(time.time() - ahead_seconds, usegmt=True)
    error = refused(lambda _: error_bytes(403, code, "Too large", headers={"Date": date}))

    assert re.search(rf"this machine's clock is {words} the store's; set it", str(error))


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 01 Jan 2026 00:00:00 +99999999999999", "x" * 5000])
def test_a_clock_that_nobody_can_compare(refused, date):
    error = refused(lambda _: error_bytes(403, "RequestTimeTooSkewed", headers={"Date": date}))
    assert "RequestTimeTooSkewed" in str(error)
    assert "set this machine's clock" in str(error)


def test_a_right_clock_is_not_blamed(refused):
    date = formatdate(time.time(), usegmt=True)
    assert "clock" not in str(refused(lambda _: error_bytes(403, "AccessDenied", headers={"Date": date})))


@pytest.mark.parametrize(
    "retry_after",
    ["9" * 5000, "Mon, 01 Jan 2026 00:00:00 +99999999999999999", "-5", "nan", "inf", "1e400", "٣", "", "soon"],
)
def test_a_wish_that_nobody_can_read(refused, retry_after):
    assert 0 <= seconds_until(retry_after) <= 1e9
    error = refused(
        lambda _: error_bytes(503, "SlowDown", headers={"Retry-After": retry_after.encode().decode("latin-1")})
    )
    assert "slow down" in str(error)


def target_of(asked):
    return asked.target


def decoded_token(_):
    return "the token PLANTEDTOKEN/with+signs== has ended"


def signature_of(asked):
    return "computed " + asked.target.partition("X-Amz-Signature=")[2][:40].upper()


def broken_up(asked):
    return " ".join(asked.target[start : start + 5] for start in range(0, len(asked.target), 5))


def authorization(asked):
    return str(dict(asked.headers))


ECHOES = [target_of, decoded_token, signature_of, broken_up, authorization, lambda asked: quote(asked.target, safe="")]
PLACES = {
    "request-id": lambda words: error_bytes(400, "Bad", headers={"x-amz-request-id": words}),
    "region": lambda words: error_bytes(301, "Bad", headers={"x-amz-bucket-region": words}),
    "code": lambda words: error_bytes(400, words),
    "message": lambda words: error_bytes(403, "AccessDenied", words.replace("&", "&amp;")),
    "throttled": lambda words: error_bytes(503, "SlowDown", words),
    "endpoint": lambda words: answer_bytes(301, f"<Endpoint>{words}</Endpoint>".encode()),
    "etag": lambda words: answer_bytes(206, b"12345678", {"Content-Range": "bytes 0-7/8", "ETag": words}),
    "content-range": lambda words: answer_bytes(206, b"12345678", {"Content-Range": words}),
    "content-encoding": lambda words: answer_bytes(
        206, b"x", {"Content-Range": "bytes 0-7/8", "Content-Encoding": words}
    ),
    "status-line": lambda words: f"{words}\r\n\r\n".encode(),
    "header-line": lambda words: f"HTTP/1.1 200 OK\r\n{words}\r\n\r\n".encode(),
    "reason": lambda words: f"HTTP/1.1 400 {words}\r\nContent-Length: 0\r\n\r\n".encode(),
    "chunk": lambda words: (
        b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-7/8\r\n\r\n" + words.encode()
    ),
    "listing": lambda words: answer_bytes(200, f"<a>{words}</a>".encode()),
    "whole": lambda words: answer_bytes(200, f"<ListBucketResult><{words}>".encode()),
}


def everything_said(error: BaseException) -> str:
    """The error, and whatever led to it."""
    texts = ["".join(traceback.format_exception(error))]
    seen = error
    while seen is not None:
        texts.append(f"{seen} {seen!r} {seen.args}")
        seen = seen.__cause__ or seen.__context__
    return " ".join(texts)


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("place", PLACES)
def test_a_request_that_is_repeated_is_not_shown(open_s3, some_credentials, caplog, place, echo):
    said = []

    def answer(asked):
        words = echo(asked)
        said.append(asked.target.partition("X-Amz-Signature=")[2] or "no signature in a listing's url")
        return PLACES[place](words)

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, **SHORT)
        outputs = []
        for ask in (lambda: storage.read_head("a", 8), storage.list, lambda: read(storage, "a", Extent(0, 8), '"x"')):
            try:
                outputs.append(repr(ask()))
            except StorageError as error:
                outputs.append(everything_said(error))
    text = " ".join(outputs) + caplog.text
    for secret in ("AKIAPLANTEDKEY", "PLANTEDTOKEN/with", "PLANTEDTOKEN%2Fwith", "PLANTEDSECRET", *said):
        assert secret.lower() not in text.lower()
    for secret in said:
        assert secret[:40].lower() not in text.lower()


def test_a_proxys_password_is_not_shown(open_s3, some_credentials, monkeypatch):
    basic = base64.b64encode(b"me:hunter2hunter2").decode()
    with HostileStore(
        lambda asked: error_bytes(400, "Bad", asked.headers["proxy-authorization"] + " hunter2hunter2")
    ) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:hunter2hunter2@"))
        storage = open_s3("s3://bucket/m", s3_endpoint_url="http://store.example.com")
        with pytest.raises(StorageError, match="HTTP 400 Bad") as caught:
            storage.read_head("a", 8)
    assert "hunter2" not in everything_said(caught.value)
    assert basic not in everything_said(caught.value)


def test_words_that_a_terminal_would_obey(refused):
    message = "\x1b[2Jgone\x07 \x9b31m \u202eetirw"
    error = refused(lambda _: error_bytes(403, "AccessDenied", message, headers={"x-amz-request-id": "\x1b[31m7"}))
    assert "gone" in str(error)
    assert not any(character in str(error) for character in "\x1b\x07\x9b\u202e\n")
    assert not any(character in repr(error.args) for character in "\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_long_words_are_cut(refused, size):
    error = refused(
        lambda _: error_bytes(400, "Bad", "word " * size, headers={"x-amz-request-id": "7" * min(size, 9000)})
    )
    assert len(str(error)) < 1000


def test_ordinary_words_stay():
    secrets = Secrets("/b/k?X-Amz-Credential=test%2F20260101%2Fus-east-1&X-Amz-Signature=" + "0123456789abcdef" * 4, {})
    for words in ("Request has expired", "tx0000-0123456789-default", "us-east-1 is wrong, 20260101 is right"):
        assert secrets.clean(words) == words
    assert Secrets("/b/k?X-Amz-Credential=k%2F20260101", {}).clean("key k is unknown") == "key k is unknown"


def test_a_read_is_refused_as_a_head_is(open_s3, some_credentials):
    def answer(asked):
        return part_of(bytes(100), asked) if not asked.number else error_bytes(403, "InvalidObjectState", "Restore it")

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url)
        etag = storage.read_head("a", 8)[1].etag
        with pytest.raises(AccessError, match=r"InvalidObjectState \(Restore it\).*archived.*attempt 2"):
            read(storage, "a", Extent(8, 100), etag)
