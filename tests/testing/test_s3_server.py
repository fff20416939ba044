"""The local S3 servers start, count, and leave nothing behind."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

import pytest

from ray_streamer.testing.rgw import missing_programs
from ray_streamer.testing.s3_server import start_s3_server


def test_upload_folder(s3_server, tmp_path):
    contents = {f"file {number}": os.urandom(1000 * number) for number in range(5)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sub").mkdir()
    assert s3_server.upload_folder(tmp_path, "uploads", "/a/b/") == "s3://uploads/a/b"
    assert s3_server.upload_folder(tmp_path, "uploads") == "s3://uploads"
    client = s3_server.client()
    for prefix in ("a/b/", ""):
        for name, content in contents.items():
            assert client.get_object(Bucket="uploads", Key=prefix + name)["Body"].read() == content
    client.close()


def test_the_gateway_counts_what_it_sends(s3_server):
    if s3_server.kind != "rgw":
        pytest.skip("only the gateway counts")
    client = s3_server.client()
    client.create_bucket(Bucket="counting")
    client.put_object(Bucket="counting", Key="a", Body=bytes(10_000_000))
    before = s3_server.requests(), s3_server.bytes_sent()
    for wanted in ("bytes=0-0", "bytes=17-116", "bytes=9999999-20000000", "bytes=0-"):
        client.get_object(Bucket="counting", Key="a", Range=wanted)["Body"].read()
    client.head_object(Bucket="counting", Key="a")
    client.list_objects_v2(Bucket="counting")
    assert s3_server.requests() - before[0] == 5
    assert s3_server.bytes_sent() - before[1] == 1 + 100 + 1 + 10_000_000
    client.close()


@pytest.mark.parametrize("kind", ["rgw", "moto"])
def test_nothing_is_left_behind(kind):
    if kind == "rgw" and missing_programs():
        pytest.skip("RADOS Gateway is not installed")
    with start_s3_server(kind) as server:
        assert server.kind == kind
        client = server.client()
        client.create_bucket(Bucket="bucket")
        client.close()
        pids = server.process_ids()
        assert pids
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not server.folder.exists()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.endpoint_url, timeout=5)
    server.stop()


def test_a_server_that_does_not_start_shows_its_log(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"moto does not answer at http://127\.0\.0\.1"):
        start_s3_server("moto")
