"""One value for each knob: argument, then environment, then another loader's variable, then default; a bad one is blamed
on where it came from, and secrets are shown nowhere."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.settings import ALIASES, MIB, SECRET_SETTINGS, Settings, replaces_runai


def test_an_argument_beats_the_environment_beats_the_default(monkeypatch):
    assert Settings.resolve().concurrency == 16
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "3")
    assert Settings.resolve().concurrency == 3
    assert Settings.resolve(concurrency=None).concurrency == 3
    assert Settings.resolve(concurrency=5).concurrency == 5


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 * MIB), ("0", 0), ("-1", -1), ("1048576", MIB), (" -1 ", -1)]
)
def test_memory_limits_are_sizes_or_minus_one(monkeypatch, text, num_bytes):
    assert Settings.resolve(memory_limit=text).memory_limit == num_bytes
    monkeypatch.setenv("RAY_STREAMER_MEMORY_LIMIT", text)
    assert Settings.resolve().memory_limit == num_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("memory_limit", -2),
        ("memory_limit", "much"),
        ("block_bytes", 5000),
        ("direct_io", "maybe"),
        ("no_such_knob", 1),
        ("startup_timeout_seconds", float("inf")),
        ("neighbour_timeout_seconds", 1e300),
        ("progress_timeout_seconds", float("nan")),
    ],
)
def test_a_bad_argument_is_named(name, value):
    for make in (Settings.resolve, Settings):
        with pytest.raises(SettingsError, match=rf"^{name}="):
            make(**{name: value})


def test_a_bad_variable_is_named_even_when_its_argument_was_left_out(monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "many")
    with pytest.raises(SettingsError, match=r"environment variable RAY_STREAMER_CONCURRENCY='many'"):
        Settings.resolve(concurrency=None)
    with pytest.raises(SettingsError, match=r"environment variable RAY_STREAMER_CONCURRENCY='many'"):
        Settings(block_bytes=MIB)


def test_settings_are_copied_and_pickled_whole():
    settings = Settings(concurrency=3, s3_access_key_id="key", s3_secret_access_key="secret")
    for copied in (pickle.loads(pickle.dumps(settings)), copy.deepcopy(settings), settings.model_copy()):
        assert copied == settings
        assert copied.s3_secret_access_key.get_secret_value() == "secret"


def test_override_keeps_what_is_not_given(monkeypatch):
    settings = Settings.resolve(concurrency=4, block_bytes=MIB)
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "9")
    assert settings.override(memory_limit="1MiB", concurrency=None) == Settings.resolve(
        concurrency=4, block_bytes=MIB, memory_limit=MIB
    )
    with pytest.raises(SettingsError, match="concurrency=0"):
        settings.override(concurrency=0)
    assert settings.override(concurrency=None) is settings


@pytest.mark.parametrize(("text", "is_on"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True)])
def test_run_ai_is_replaced_where_the_variable_says_so(monkeypatch, caplog, text, is_on):
    if text is not None:
        monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", text)
    assert replaces_runai() is is_on
    Settings.resolve()
    assert not caplog.records


def test_a_switch_that_is_neither_on_nor_off_is_named(monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", "perhaps")
    with pytest.raises(SettingsError, match=r"RAY_STREAMER_REPLACE_RUNAI='perhaps': give 1, or leave it out"):
        replaces_runai()


ALIAS_CASES = [
    ("RUNAI_STREAMER_CONCURRENCY", "20", "concurrency", 20),
    ("RUNAI_STREAMER_MEMORY_LIMIT", "1073741824", "memory_limit", 1 << 30),
    ("RUNAI_STREAMER_MEMORY_LIMIT", "-1", "memory_limit", -1),
    ("RUNAI_STREAMER_MEMORY_LIMIT", "0", "memory_limit", 0),
    ("RUNAI_STREAMER_CHUNK_BYTESIZE", "16777216", "block_bytes", 16 * MIB),
    ("RUNAI_STREAMER_S3_TIMEOUT", "30", "retry_deadline_seconds", 30.0),
    ("RUNAI_STREAMER_S3_TIMEOUT", "0", "retry_deadline_seconds", 120.0),
    ("RUNAI_STREAMER_S3_ENDPOINT", "http://minio:9000", "s3_endpoint_url", "http://minio:9000"),
    ("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0", "s3_addressing", "path"),
    ("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1", "s3_addressing", "virtual"),
    ("RUNAI_STREAMER_S3_UNSIGNED", "1", "s3_unsigned", True),
    ("RUNAI_STREAMER_S3_UNSIGNED", "0", "s3_unsigned", False),
    ("RUNAI_STREAMER_S3_UNSIGNED", "", "s3_unsigned", False),
]


@pytest.mark.parametrize(("variable", "text", "name", "value"), ALIAS_CASES)
def test_variables_of_another_loader_are_understood(monkeypatch, variable, text, name, value):
    monkeypatch.setenv(variable, text)
    assert getattr(Settings.resolve(), name) == value
    assert Settings.resolve() == Settings.resolve(**{name: value})


def test_every_alias_is_tried_above():
    assert {case[0] for case in ALIAS_CASES} == {alias.variable for alias in ALIASES}
    assert {alias.setting for alias in ALIASES} <= set(Settings.model_fields)


def test_own_variables_and_arguments_come_before_those_of_another_loader(monkeypatch):
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "20")
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "30")
    assert Settings.resolve().concurrency == 30
    assert Settings.resolve(concurrency=40).concurrency == 40
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "")
    assert Settings.resolve().concurrency == 20


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("RUNAI_STREAMER_CONCURRENCY", "2000"),
        ("RUNAI_STREAMER_MEMORY_LIMIT", "-7"),
        ("RUNAI_STREAMER_CHUNK_BYTESIZE", "2097153"),
        ("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "perhaps"),
    ],
)
def test_a_bad_variable_of_another_loader_is_named(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingsError, match=rf"^environment variable {variable}='{text}'"):
        Settings.resolve()


KEYS = {
    "s3_access_key_id": "PLANTEDKEY",
    "s3_secret_access_key": "PLANTEDSECRET",
    "s3_session_token": "PLANTEDTOKEN",
    "hf_token": "hf_PLANTEDTOKEN",
    "http_query": "sig=PLANTEDSIGNATURE",
    "http_signed": '{"query": "PLANTEDSIGNATURE"}',
    "http_authorization": "Bearer PLANTEDTOKEN",
}


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr("ray_streamer.settings.sources._told", set())


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("RAY_STREAMER_CONCURENCY", "did you mean RAY_STREAMER_CONCURRENCY?"),
        ("RAY_STREAMER_MEMORY_LIMITS", "did you mean RAY_STREAMER_MEMORY_LIMIT?"),
        ("ray_streamer_blok_bytes", "did you mean RAY_STREAMER_BLOCK_BYTES?"),
        ("RAY_STREAMER_S3_SECRET_KEY", "did you mean RAY_STREAMER_S3_"),
        ("RAY_STREAMER_ZZZ", "docs/settings.md lists them"),
    ],
)
def test_a_misspelt_variable_is_told_once_and_without_its_value(monkeypatch, caplog, told, variable, said):
    monkeypatch.setenv(variable, "PLANTED")
    for _ in range(3):
        Settings.resolve().override(concurrency=2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"environment variable {variable} is no setting; {said}")
    assert "PLANTED" not in record.getMessage()


def test_variables_that_are_settings_or_nothing_of_ours_are_not_told(monkeypatch, caplog, told):
    for name in Settings.model_fields:
        monkeypatch.setenv(f"RAY_STREAMER_{name.upper()}", "")
    monkeypatch.setenv("ray_streamer_concurrency", "3")
    monkeypatch.setenv("RAY_STREAMERS", "1")
    monkeypatch.setenv("RUNAI_STREAMER_OBJ_CONCURRENCY", "1")
    Settings.resolve()
    assert not caplog.records


@pytest.mark.parametrize(("name", "meant"), [("concurency", "concurrency"), ("s3_endpoint", "s3_endpoint_url")])
def test_a_misspelt_argument_is_told_what_was_meant(name, meant):
    with pytest.raises(SettingsError, match=rf"^{name}=\(not shown\): no such setting; did you mean {meant}\?$"):
        Settings.resolve(**{name: "PLANTED"})


@pytest.mark.parametrize(
    "said", ["certificates/ca.pem", "./certificates/../certificates/ca.pem", Path("certificates/ca.pem")]
)
def test_a_file_is_meant_where_it_is_said(monkeypatch, tmp_path, said):
    monkeypatch.chdir(tmp_path)
    settings = Settings.resolve(s3_ca_bundle=said)
    monkeypatch.setenv("RAY_STREAMER_S3_CA_BUNDLE", str(said))
    assert Settings.resolve().s3_ca_bundle == settings.s3_ca_bundle == str(tmp_path / "certificates" / "ca.pem")


def test_a_file_may_lie_in_a_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.resolve(s3_ca_bundle="~/ca.pem").s3_ca_bundle == str(tmp_path / "ca.pem")


def test_secrets_are_known_and_hidden():
    assert set(KEYS) == SECRET_SETTINGS
    settings = Settings.resolve(**KEYS).override(concurrency=3)
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "PLANTED" not in text
    there = pickle.loads(pickle.dumps(settings))
    assert {name: getattr(there, name).get_secret_value() for name in KEYS} == KEYS


def test_secrets_from_variables(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(f"RAY_STREAMER_{name.upper()}", value)
    assert Settings.resolve() == Settings.resolve(**KEYS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"s3_secret_access_key": 12345}, "s3_secret_access_key="),
        ({"s3_secret_acces_key": "PLANTEDSECRET"}, "s3_secret_acces_key="),
        ({"s3_secret_access_key": "PLANTEDSECRET"}, "go together"),
        ({"s3_access_key_id": "PLANTEDKEY"}, "go together"),
        ({"s3_session_token": "PLANTEDTOKEN"}, "s3_session_token needs"),
        ({**KEYS, "s3_unsigned": True}, "s3_unsigned"),
        ({**KEYS, "concurrency": 0}, "concurrency=0"),
        ({"s3_unsigned": True, "s3_requester_pays": True}, "s3_unsigned.*s3_requester_pays"),
        ({"s3_endpoint_url": "http://key:PLANTEDSECRET@minio:9000"}, "s3_endpoint_url=.*credentials"),
    ],
)
def test_what_is_wrong_with_secrets_is_told_without_them(given, words):
    with pytest.raises(SettingsError, match=words) as caught:
        Settings.resolve(**given)
    error = caught.value
    while error is not None:
        for value in ("PLANTED", "12345"):
            assert value not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__
