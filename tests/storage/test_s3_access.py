"""Whom boto3 is told to be, where to go and how to sign, for every kind of bucket; nothing here needs a network."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.stub import Stubber

from ray_streamer.errors import AccessError, CredentialsError, SettingsError, StorageError
from ray_streamer.settings import Settings
from ray_streamer.storage.s3_client import SignedUrls, open_access
from ray_streamer.storage.s3_faults import sdk_faults_translated
from ray_streamer.storage.s3_location import S3Location
from ray_streamer.testing.hostile_store import answer_bytes
from ray_streamer.testing.loopback import LoopbackServer

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"
OUTPOST = "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-01ac5d28a6a232904/accesspoint/models"


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMTHEENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")


@pytest.fixture
def access_of():
    opened = []

    def access_of(uri, **settings):
        opened.append(open_access(uri, Settings.resolve(**settings)))
        return opened[-1]

    yield access_of
    for access in opened:
        access.client.close()


def signed(access, key="k", seconds=60):
    """Address, and query, of a signed url."""
    parts = urlsplit(access.sign(key, seconds))
    return f"{parts.scheme}://{parts.netloc}{parts.path}", {n: v[0] for n, v in parse_qs(parts.query).items()}


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://models", "models", ""),
        ("s3://models/", "models", ""),
        ("s3://models/llama/70b/", "models", "llama/70b"),
        ("s3://models//llama", "models", "/llama"),
        (f"s3://{ACCESS_POINT}", ACCESS_POINT, ""),
        (f"s3://{ACCESS_POINT}/llama/70b", ACCESS_POINT, "llama/70b"),
        (f"s3://{ACCESS_POINT.replace('t/', 't:')}/llama", ACCESS_POINT.replace("t/", "t:"), "llama"),
        (f"s3://{OUTPOST}/llama", OUTPOST, "llama"),
        ("s3://models--use1-az4--x-s3/llama", "models--use1-az4--x-s3", "llama"),
    ],
)
def test_location(uri, bucket, prefix):
    assert S3Location.parse(uri) == S3Location(bucket, prefix)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3:///llama", "no bucket"),
        ("s3://arn:aws:s3:::models/llama", r"s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix"),
        ("s3://arn:aws:sqs:eu-west-1:123456789012:accesspoint/llama", "ARN"),
    ],
)
def test_a_uri_that_names_no_bucket(uri, words):
    with pytest.raises(SettingsError, match=words):
        S3Location.parse(uri)


def test_directory_buckets_list_folders_only():
    here, there = S3Location("models", "llama"), S3Location("models--use1-az4--x-s3", "llama")
    assert [here.listable(""), here.listable("mod"), here.listable("a/b")] == ["llama/", "llama/mod", "llama/a/b"]
    assert [there.listable(""), there.listable("mod"), there.listable("a/b")] == ["llama/", "llama/", "llama/a/"]
    assert S3Location("models--use1-az4--x-s3", "").listable("mod") == ""


@pytest.mark.parametrize(
    ("uri", "settings", "address"),
    [
        ("s3://models/a", {}, "https://models.s3.us-west-2.amazonaws.com/k"),
        ("s3://models/a", {"s3_addressing": "path"}, "https://s3.us-west-2.amazonaws.com/models/k"),
        ("s3://models/a", {"s3_region": "eu-west-1"}, "https://models.s3.eu-west-1.amazonaws.com/k"),
        ("s3://models/a", {"s3_unsigned": True}, "https://models.s3.us-west-2.amazonaws.com/k"),
        ("s3://dots.in.name/a", {}, "https://s3.us-west-2.amazonaws.com/dots.in.name/k"),
        ("s3://models/a", {"s3_endpoint_url": "http://minio:9000"}, "http://minio:9000/models/k"),
        (
            "s3://models/a",
            {"s3_endpoint_url": "http://minio:9000", "s3_addressing": "virtual"},
            "http://models.minio:9000/k",
        ),
        (
            "s3://models/a",
            {"s3_endpoint_url": "https://storage.googleapis.com"},
            "https://storage.googleapis.com/models/k",
        ),
        (f"s3://{ACCESS_POINT}/a", {}, "https://models-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/k"),
        (
            f"s3://{OUTPOST}/a",
            {},
            "https://models-123456789012.op-01ac5d28a6a232904.s3-outposts.eu-west-1.amazonaws.com/k",
        ),
    ],
)
def test_where_requests_go(access_of, uri, settings, address):
    access = access_of(uri, **settings)
    url, query = signed(access)
    assert url == address
    if settings.get("s3_unsigned"):
        assert query == {}
        return
    assert query["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert query["X-Amz-SignedHeaders"] == "host"
    assert query["X-Amz-Credential"].startswith("FROMTHEENVIRONMENT/")
    region = "eu-west-1" if "eu-west-1" in address else "us-west-2"
    assert f"/{region}/" in query["X-Amz-Credential"]


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_of_the_environment(access_of, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://ceph:8000")
    access = access_of("s3://models")
    assert (access.endpoint, signed(access)[0]) == ("http://ceph:8000", "http://ceph:8000/models/k")
    monkeypatch.setenv("RUNAI_STREAMER_S3_ENDPOINT", "http://minio:9000")
    assert signed(access_of("s3://models"))[0] == "http://minio:9000/models/k"


@pytest.mark.parametrize("url", ["http://KEY:PLANTEDSECRET@ceph:8000", "http://KEY:PLANTEDSECRET@"])
def test_credentials_in_an_endpoint_are_refused_unseen(access_of, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(SettingsError, match="s3://models") as caught:
        access_of("s3://models")
    assert "PLANTED" not in f"{caught.value} {caught.value.__cause__!r}"


def test_without_a_region_the_first_one_is_asked(access_of, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    url, query = signed(access_of("s3://models"))
    assert url in ("https://models.s3.amazonaws.com/k", "https://models.s3.us-east-1.amazonaws.com/k")
    assert "/us-east-1/" in query["X-Amz-Credential"]


def test_the_payer_is_named_and_the_name_is_signed(access_of):
    access = access_of("s3://models", s3_requester_pays=True)
    assert access.headers == {"x-amz-request-payer": "requester"}
    assert signed(access)[1]["X-Amz-SignedHeaders"] == "host;x-amz-request-payer"
    assert access.arguments == {"Bucket": "models", "RequestPayer": "requester"}
    assert access_of("s3://models").headers == {}


def test_a_directory_bucket_is_signed_for_in_a_session(access_of):
    access = access_of("s3://models--usw2-az1--x-s3/llama")
    session = {
        "AccessKeyId": "OFTHESESSION",
        "SecretAccessKey": "secret",
        "SessionToken": "token",
        "Expiration": datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5),
    }
    with Stubber(access.client) as stub:
        stub.add_response("create_session", {"Credentials": session}, {"Bucket": "models--usw2-az1--x-s3"})
        urls = SignedUrls(access.sign, in_a_session=True)
        parts = urlsplit(urls.url_of("llama/k"))
        query = parse_qs(parts.query)
        # The session is opened once, and so is an object's url.
        assert urls.url_of("llama/k").endswith(parts.query)
        assert "OFTHESESSION" in urls.url_of("llama/other")
    assert parts.netloc == "models--usw2-az1--x-s3.s3express-usw2-az1.us-west-2.amazonaws.com"
    assert query["X-Amz-Credential"][0].startswith("OFTHESESSION/")
    assert "/s3express/" in query["X-Amz-Credential"][0]
    assert (query["X-Amz-S3session-Token"], query["X-Amz-Expires"]) == (["token"], ["300"])


def test_keys_of_the_settings_come_first(access_of):
    access = access_of(
        "s3://models", s3_access_key_id="GIVEN", s3_secret_access_key="secret", s3_session_token="sometoken"
    )
    query = signed(access)[1]
    assert query["X-Amz-Credential"].startswith("GIVEN/")
    assert query["X-Amz-Security-Token"] == "sometoken"
    assert "secret" not in repr(access)


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """A configuration file with a profile for each way to get credentials; none in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"Version": 1, "AccessKeyId": "OFAPROCESS", "SecretAccessKey": "secret"}))
    path = tmp_path / "config"
    path.write_text(
        f"""
[profile keys]
aws_access_key_id = OFAPROFILE
aws_secret_access_key = secret
region = eu-central-1
[profile process]
credential_process = {sys.executable} -c "print(open('{answer}').read())"
region = eu-central-1
endpoint_url = http://ceph:8000
[profile sso]
sso_start_url = https://example.awsapps.com/start
sso_region = eu-central-1
sso_account_id = 123456789012
sso_role_name = reader
region = eu-central-1
"""
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("profiles")
def test_profiles(access_of, monkeypatch):
    url, query = signed(access_of("s3://models", s3_profile="keys"))
    assert url == "https://models.s3.eu-central-1.amazonaws.com/k"
    assert query["X-Amz-Credential"].startswith("OFAPROFILE/")
    monkeypatch.setenv("AWS_PROFILE", "process")
    url, query = signed(access_of("s3://models"))
    assert url == "http://ceph:8000/models/k"
    assert query["X-Amz-Credential"].startswith("OFAPROCESS/")


@pytest.mark.usefixtures("profiles")
def test_a_profile_that_nobody_logged_in_to(access_of):
    from ray_streamer.storage import open_storage

    storage = open_storage("s3://models/llama", Settings.resolve(s3_profile="sso"))
    with pytest.raises(CredentialsError, match=r"no AWS credentials for s3://models/llama/a.*`aws sso login`"):
        storage.read_head("a", 1)
    storage.close()


ENDED = {"Version": 1, "AccessKeyId": "planted", "SecretAccessKey": "planted", "Expiration": "2020-01-01T00:00:00Z"}
FAILURES = {
    "ended": (f"echo '{json.dumps(ENDED)}'", "still expired"),
    "no-object": ("echo '[]'", "AttributeError"),
    "no-json": ("echo planted", "found no credentials: .* no JSON; look at credential_process"),
    "no-key": ("echo '{}'", "credential_process|Version"),
    "fails": ("echo planted >&2; exit 3", "credential_process|CredentialRetrievalError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_programs_that_give_no_credentials(access_of, monkeypatch, tmp_path, failure):
    """Whatever botocore makes of it: an error of this package at once, when the storage is opened or when it signs."""
    script, words = FAILURES[failure]
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with (
        pytest.raises((AccessError, SettingsError, StorageError), match=words) as caught,
        sdk_faults_translated("s3://models/k", endpoint="https://store", has_answered=False),
    ):
        access_of("s3://models").sign("k", 60)
    assert "planted" not in str(caught.value)


def test_files_that_are_not_there(access_of, monkeypatch, tmp_path):
    """A token that nobody mounted is told at once, with its path, and is no fault of the network."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    with pytest.raises(AccessError, match=rf"FileNotFoundError.*{tmp_path}/nothing.*AWS_WEB_IDENTITY_TOKEN_FILE"):
        access_of("s3://models").sign("k", 60)


SIGN = """
from ray_streamer.settings import Settings
from ray_streamer.storage.s3_client import open_access
open_access("s3://models", Settings.resolve(s3_profile="code")).sign("k", 60)
"""


def test_a_profile_that_asks_for_a_code(monkeypatch, tmp_path):
    """botocore asks for it at the terminal, and ranks have none."""
    role = "role_arn = arn:aws:iam::123456789012:role/reader\nmfa_serial = arn:aws:iam::123456789012:mfa/me\n"
    (tmp_path / "config").write_text(f"[profile code]\n{role}credential_source = Environment\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    rank = subprocess.run(
        [sys.executable, "-c", SIGN],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert rank.returncode
    assert "CredentialsError: boto3 found no credentials: the profile's mfa_serial asks for a code" in rank.stderr


STS_REFUSALS = {
    "trust": (403, "AccessDenied", "AssumeRoleWithWebIdentity was refused: HTTP 403 AccessDenied.*trust policy"),
    "token": (400, "ExpiredTokenException", "AssumeRoleWithWebIdentity was refused: HTTP 400 ExpiredTokenException"),
    "skew": (403, "SignatureDoesNotMatch", "AssumeRoleWithWebIdentity was refused"),
}


@pytest.fixture
def web_identity(monkeypatch, tmp_path):
    """Credentials come from a token, as on EKS; the function says which server gives them."""
    (tmp_path / "token").write_text("the token of a pod")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    return lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)


@pytest.mark.parametrize("refusal", STS_REFUSALS)
def test_a_role_that_is_refused_is_no_refusal_of_an_object(access_of, web_identity, refusal):
    """Else optional files would count as missing: a store hides those that a user may not see."""
    status, code, words = STS_REFUSALS[refusal]
    body = f"<ErrorResponse><Error><Code>{code}</Code><Message>planted</Message></Error></ErrorResponse>".encode()

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer_bytes(status, body))

        def log_message(self, *_):
            pass

    with LoopbackServer(Refusing) as sts:
        web_identity(f"http://{sts.address}")
        with (
            pytest.raises(CredentialsError, match=rf"no AWS credentials for s3://models/k: {words}") as caught,
            sdk_faults_translated("s3://models/k", endpoint="https://store", has_answered=False),
        ):
            access_of("s3://models").sign("k", 60)
    assert "planted" not in str(caught.value)


def test_a_server_of_credentials_that_cannot_be_reached(access_of, web_identity, dead_port):
    web_identity(f"http://127.0.0.1:{dead_port}")
    with (
        pytest.raises(
            StorageError, match=rf"no answer from http://127.0.0.1:{dead_port}/.*boto3 asks there for credentials"
        ),
        sdk_faults_translated("s3://models/k", endpoint="https://store", has_answered=False),
    ):
        access_of("s3://models").sign("k", 60)
