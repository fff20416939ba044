"""Whatever a plain boto3 client would do with a profile and an environment, we do."""

from __future__ import annotations

import os
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from botocore.config import Config

from ray_streamer.errors import SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.s3_client import open_access
from ray_streamer.storage.s3_location import S3Location
from ray_streamer.testing.certificates import make_certificates

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"
ELSEWHERE = "endpoint_url = https://oss-cn-x.example.test\n"
VIRTUAL = "s3 =\n    addressing_style = virtual\n"


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """A function that writes the configuration file and sets variables."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMTHEENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    def configure(text, variables):
        (tmp_path / "config").write_text(f"[default]\nregion = us-west-2\n{text}")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return configure


def address_of(client, bucket, *, is_listing=False):
    """Where a signed url leads, and how it was signed."""
    what = {"Bucket": bucket, "Prefix": "m"} if is_listing else {"Bucket": bucket, "Key": "m/k"}
    method = "list_objects_v2" if is_listing else "get_object"
    parts = urlsplit(client.generate_presigned_url(method, Params=what, ExpiresIn=60))
    query = parse_qs(parts.query)
    credential = query.get("X-Amz-Credential", [""])[0].split("/")[2:]
    return parts.scheme, parts.netloc, parts.path, query.get("X-Amz-Algorithm", ["the old way"]), credential


@pytest.mark.parametrize("bucket", ["models", "dots.in.name", "UPPER_case", ACCESS_POINT])
@pytest.mark.parametrize(
    ("profile", "variables"),
    [
        pytest.param(VIRTUAL, {}, id="virtual"),
        pytest.param("s3 =\n    addressing_style = path\n", {}, id="path"),
        pytest.param(f"{ELSEWHERE}s3 =\n    addressing_style = virtual\n", {}, id="virtual-elsewhere"),
        pytest.param(f"{ELSEWHERE}s3 =\n    addressing_style = path\n", {}, id="path-elsewhere"),
        pytest.param(f"{ELSEWHERE}s3 =\n    addressing_style = auto\n", {}, id="auto-elsewhere"),
        pytest.param(ELSEWHERE, {}, id="endpoint"),
        pytest.param(ELSEWHERE + VIRTUAL, {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, id="endpoint-ignored"),
        pytest.param(
            "ignore_configured_endpoint_urls = true\n" + ELSEWHERE + VIRTUAL, {}, id="endpoint-ignored-by-the-profile"
        ),
        pytest.param(ELSEWHERE, {"AWS_ENDPOINT_URL": "http://ceph:8000"}, id="endpoint-of-the-environment"),
        pytest.param(
            ELSEWHERE,
            {"AWS_ENDPOINT_URL": "http://ceph:8000", "AWS_ENDPOINT_URL_S3": "http://minio:9000"},
            id="endpoint-of-s3",
        ),
        pytest.param(
            "services = mine\n[services mine]\ns3 =\n    endpoint_url = https://minio.example.test:9000\n",
            {},
            id="services-section",
        ),
        pytest.param(VIRTUAL, {"AWS_DEFAULT_REGION": "eu-west-3"}, id="region"),
        pytest.param("use_dualstack_endpoint = true\ns3 =\n    addressing_style = path\n", {}, id="dualstack"),
        pytest.param(VIRTUAL, {"AWS_USE_DUALSTACK_ENDPOINT": "true"}, id="dualstack-variable"),
        pytest.param(VIRTUAL, {"AWS_USE_FIPS_ENDPOINT": "true"}, id="fips"),
        pytest.param("s3 =\n    addressing_style = virtual\n    use_accelerate_endpoint = true\n", {}, id="accelerate"),
        pytest.param("s3 =\n    addressing_style = path\n    use_arn_region = false\n", {}, id="region-of-the-arn"),
        pytest.param("s3 =\n    addressing_style = path\n    signature_version = s3\n", {}, id="old-signature"),
        pytest.param("s3 =\n    addressing_style = path\n    signature_version = s3v4\n", {}, id="new-signature"),
        pytest.param(
            "s3 =\n    addressing_style = virtual\n    us_east_1_regional_endpoint = legacy\n",
            {"AWS_DEFAULT_REGION": "us-east-1"},
            id="legacy-region",
        ),
        pytest.param("max_attempts = 7\nretry_mode = adaptive\n" + ELSEWHERE, {}, id="retries"),
        pytest.param(
            "request_checksum_calculation = when_supported\n" + ELSEWHERE,
            {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_supported"},
            id="checksums",
        ),
        pytest.param("defaults_mode = standard\n" + ELSEWHERE, {}, id="defaults-mode"),
        pytest.param("parameter_validation = false\n" + ELSEWHERE, {}, id="no-validation"),
    ],
)
def test_requests_go_where_boto3_sends_them(configure, profile, variables, bucket):
    configure(profile, variables)
    in_profile = "signature_version" in profile
    plain = boto3.session.Session().client("s3", config=None if in_profile else Config(signature_version="s3v4"))
    try:
        expected = address_of(plain, bucket)
    except Exception as error:
        with pytest.raises((SettingsError, type(error))):
            address_of(open_access(f"s3://{bucket}/m", Settings.resolve()).client, bucket)
        return
    finally:
        plain.close()
    access = open_access(f"s3://{bucket}/m", Settings.resolve())
    assert address_of(access.client, bucket) == expected
    listing = urlsplit(access.sign_listing("m/", "", recursive=False).url)
    theirs = address_of(access.client, bucket, is_listing=True)
    assert (listing.scheme, listing.netloc, listing.path or "/") == (theirs[0], theirs[1], theirs[2] or "/")
    access.client.close()


def test_the_setting_comes_before_the_profile(configure):
    configure(f"{ELSEWHERE}s3 =\n    addressing_style = virtual\n", {})
    access = open_access("s3://models", Settings.resolve(s3_addressing="path"))
    assert address_of(access.client, "models")[1:3] == ("oss-cn-x.example.test", "/models/m/k")
    access.client.close()


@pytest.mark.parametrize("named_in", ["environment", "profile"])
def test_an_empty_region_is_none(configure, named_in):
    """A template of a pod leaves `AWS_DEFAULT_REGION=` empty; boto3 itself then signs for, and asks, a region of no name."""
    profile, variables = ("[profile empty]\nregion =\n", {"AWS_PROFILE": "empty"})
    configure(profile, variables if named_in == "profile" else {"AWS_DEFAULT_REGION": ""})
    access = open_access("s3://models", Settings.resolve())
    scheme, host, _, _, credential = address_of(access.client, "models")
    assert (scheme, host, credential[0]) == ("https", "models.s3.amazonaws.com", "us-east-1")
    access.client.close()


@pytest.fixture
def authorities(tmp_path):
    """Certificate files by who names them."""
    files = {}
    for name in ("setting", "AWS_CA_BUNDLE", "profile", "REQUESTS_CA_BUNDLE"):
        (tmp_path / name).mkdir()
        files[name] = str(make_certificates(tmp_path / name).ca_file)
    return files


def test_authorities_are_found_in_boto3s_order(configure, authorities, monkeypatch):
    named = list(authorities)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example.test")
    while named:
        variables = {name: authorities[name] for name in named if name.isupper()}
        configure(f"ca_bundle = {authorities['profile']}\n" if "profile" in named else "", variables)
        given = {"s3_ca_bundle": authorities["setting"]} if "setting" in named else {}
        access = open_access("s3://models", Settings.resolve(**given))
        assert access.ca_file == authorities[named[0]]
        access.client.close()
        monkeypatch.delenv(named.pop(0), raising=False)
    access = open_access("s3://models", Settings.resolve())
    assert os.path.basename(access.ca_file) == "cacert.pem"
    access.client.close()


@pytest.mark.parametrize("named_by", ["s3_ca_bundle", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_text("no certificate"), "no certificate in PEM format"),
        (lambda path: path.write_bytes(b"\x00\xff" * 100), "no certificate in PEM format"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_an_authority_that_cannot_be_used_is_told_at_once(configure, tmp_path, named_by, make, words):
    path = tmp_path / "ca.pem"
    make(path)
    variables = {named_by: str(path)} if named_by.isupper() else {}
    configure(f"ca_bundle = {path}\n" if named_by == "ca_bundle" else "", variables)
    given = {"s3_ca_bundle": str(path)} if named_by == "s3_ca_bundle" else {}
    with pytest.raises(SettingsError, match=rf"ca\.pem.*{named_by}.*{words}"):
        open_storage("s3://models", Settings.resolve(s3_endpoint_url="https://127.0.0.1:1", **given))


def test_an_authority_that_nobody_needs_is_not_looked_at(configure):
    configure("", {"REQUESTS_CA_BUNDLE": "/nosuch.pem"})
    open_storage("s3://models", Settings.resolve(s3_endpoint_url="http://127.0.0.1:1")).close()


@pytest.mark.parametrize(
    ("uri", "bucket"),
    [
        ("s3://acme:models/llama", "acme:models"),
        ("s3://:models/llama", ":models"),
        ("s3://acme$team:models", "acme$team:models"),
    ],
)
def test_a_bucket_of_another_tenant(configure, uri, bucket):
    configure("", {"AWS_ENDPOINT_URL": "http://ceph:8000"})
    assert S3Location.parse(uri).bucket == bucket
    access = open_access(uri, Settings.resolve())
    url = access.sign("k", 60)
    assert urlsplit(url).netloc == "ceph:8000"
    assert urlsplit(url).path.replace("%3A", ":").replace("%24", "$") == f"/{bucket}/k"
    assert (
        urlsplit(access.sign_listing("", "", recursive=True).url).path.replace("%3A", ":").replace("%24", "$")
        == f"/{bucket}"
    )
    access.client.close()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://acme:models/llama",
        "s3://a:b:c/llama",
        "s3://two words/llama",
        "s3://a\x1b[31m/llama",
        "s3://ü/llama",
        "s3://acme:/llama",
        "s3://a?b/llama",
        "s3://" + "b" * 256,
    ],
)
def test_buckets_that_cannot_be_are_told_at_once(configure, uri):
    configure("", {})
    with pytest.raises(SettingsError) as caught:
        open_storage(uri, Settings.resolve())
    assert "regex" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_a_tenants_bucket_on_a_real_store(s3_server, open_s3):
    keys = {"s3_access_key_id": "acmeaccesskey", "s3_secret_access_key": "acmesecretkey0123456789"}
    s3_server.add_user("acme$reader", *keys.values())
    owner = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint_url,
        aws_access_key_id="acmeaccesskey",
        aws_secret_access_key="acmesecretkey0123456789",
        region_name="us-east-1",
    )
    owner.create_bucket(Bucket="weights")
    owner.put_object(Bucket="weights", Key="m/a", Body=b"abc")
    owner.close()
    storage = open_s3("s3://acme:weights/m", s3_endpoint_url=s3_server.endpoint_url, s3_region="us-east-1", **keys)
    assert storage.list() == ["a"]
    assert storage.read_head("a", 2)[0] == b"ab"
