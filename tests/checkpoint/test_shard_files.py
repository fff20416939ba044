"""Folders without an index json: names that count say which files are missing, in every spelling that tools write."""

from __future__ import annotations

import json
import re

import pytest

from ray_streamer.checkpoint import locate, open_checkpoint
from ray_streamer.checkpoint.shard_files import adapter_files_of, component_files_of, shard_files_of
from ray_streamer.errors import ObjectMissingError, StorageError
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header

SPELLINGS = [
    "model-{:05d}-of-{:05d}.safetensors",
    "model-{:05d}-of-{:05d}.fp16.safetensors",
    "model.fp16-{:05d}-of-{:05d}.safetensors",
    "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors",
    "pytorch_model_{}_of_{}.safetensors",
    "model-{}-of-{}.safetensors",
    "model {} of {}.safetensors",
    "model.{:02d}.of.{:02d}.safetensors",
    "{:06d}of{:06d}.safetensors",
    "layers-1to40-{:02d}-OF-{:02d}.safetensors",
    "a\n-{}-of-{}.safetensors",
]


def shard(name: str) -> bytes:
    spec = TensorSpec(name, "U8", (3,))
    return serialize_header([spec]) + bytes(spec.num_bytes)


@pytest.fixture
def opened(recording):
    return lambda uri, **options: open_checkpoint(uri, recording(locate(uri).folder_uri), **options)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_counts(spelling: str, first: int) -> None:
    names = [spelling.format(number, 4) for number in range(first, first + 4)]
    assert shard_files_of([*names, "config.json"], uri="s3://b/m") == sorted(names)
    for gone in names:
        if first == 0 and gone == names[0]:
            # Then the numbers are those of files that are counted from 1, and the fourth is missing.
            continue
        with pytest.raises(
            ObjectMissingError, match=r"s3://b/m is incomplete: 1 file is missing.*give the uri of"
        ) as caught:
            shard_files_of([name for name in names if name != gone], uri="s3://b/m")
        assert repr(gone)[1:-1] in str(caught.value)


def test_two_sets_are_counted_apart() -> None:
    whole = ["a-1-of-2.safetensors", "a-2-of-2.safetensors", "b-1-of-1.safetensors", "rest.safetensors"]
    assert shard_files_of(whole, uri="m") == whole
    with pytest.raises(ObjectMissingError, match=r"3 files are missing.*'a-2-of-2.*', 'b-2-of-3.*', 'b-3-of-3"):
        shard_files_of(["a-1-of-2.safetensors", "b-1-of-3.safetensors", "rest.safetensors"], uri="m")


def test_numbers_that_count_nothing() -> None:
    for names in (
        ["model-3-of-2.safetensors"],
        ["llama-3.1-8b.safetensors", "llama-3.3-70b.safetensors"],
        ["1.safetensors", "3.safetensors"],
        ["checkpoint-1500.safetensors", "checkpoint-500.safetensors"],
        ["best-of-3.safetensors"],
        ["rank4.safetensors", "rank5.safetensors"],
        ["shard-00001-model-00001-of-00002.safetensors", "shard-00002-model-00002-of-00002.safetensors"],
    ):
        assert shard_files_of(names, uri="m") == names


@pytest.mark.parametrize(
    "spelling", ["rank{}", "stage-rank-{}-part-0", "stage-rank-0-part-{}", "mp_rank_{:02d}", "shard.{:03d}"]
)
def test_gaps_of_numbers_without_a_total(spelling: str) -> None:
    names = [f"{spelling}.safetensors".format(number) for number in (4, 5, 7)]
    if "part-0" in spelling:
        assert shard_files_of(names, uri="m") == names
        return
    with pytest.raises(ObjectMissingError, match=re.escape(f"{spelling}.safetensors".format(6))):
        shard_files_of(names, uri="m")


def test_a_count_without_end_costs_nothing() -> None:
    with pytest.raises(
        ObjectMissingError, match=r"999999998 files are missing.*'m-000000001-of.* and 999999993 more"
    ) as caught:
        shard_files_of(["m-000000007-of-999999999.safetensors"], uri="m")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "being_written",
    [
        "b.safetensors.incomplete",
        "b.safetensors.part",
        "b.safetensors.tmp",
        "b.safetensors.crdownload",
        ".b.safetensors.Xa3f9Q",
        "a.safetensors.aria2",
    ],
)
def test_files_that_are_being_written(being_written: str) -> None:
    with pytest.raises(ObjectMissingError, match=r"safetensors' is not completely written\. Wait"):
        shard_files_of(["a.safetensors", being_written], uri="m")


@pytest.mark.parametrize(
    "beside",
    [
        "a.safetensors.tmp",
        "a.safetensors.sha256",
        "a.safetensors.index.json",
        "notes.part",
        "adapter_model.safetensors.tmp",
    ],
)
def test_what_lies_beside_whole_files_does_no_harm(beside: str) -> None:
    assert shard_files_of(["a.safetensors", beside], uri="m") == ["a.safetensors"]


def test_files_of_other_parts_are_left_alone() -> None:
    others = ["adapter_model.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.00.safetensors"]
    assert shard_files_of([*others, ".x.safetensors", "a.safetensors"], uri="m") == ["a.safetensors"]
    assert shard_files_of(["model.safetensors", "model-00001-of-00002.safetensors"], uri="m") == ["model.safetensors"]


def test_one_file_of_several_by_its_own_uri(place, opened):
    uri = place({"model-00002-of-00003.safetensors": shard("a")})
    with pytest.raises(ObjectMissingError, match="2 files are missing"):
        opened(uri)
    assert opened(f"{uri}/model-00002-of-00003.safetensors").names == ("a",)


def test_an_index_json_that_names_some_of_the_files(place, opened):
    index = b'{"weight_map": {"a": "model-00002-of-00003.safetensors"}}'
    uri = place({"model-00002-of-00003.safetensors": shard("a"), "stage.json": index})
    assert opened(f"{uri}/stage.json").names == ("a",)


@pytest.mark.parametrize("target", ["../../blobs/gone", "/nowhere/x", "a.safetensors/x"])
def test_links_that_lead_nowhere(tmp_path, opened, target):
    (tmp_path / "a.safetensors").write_bytes(shard("a"))
    (tmp_path / "b.safetensors").symlink_to(target)
    with pytest.raises(ObjectMissingError, match=r"is incomplete: 'b\.safetensors' does not lead to a file"):
        opened(str(tmp_path))


def test_a_link_to_itself(tmp_path, opened):
    (tmp_path / "a.safetensors").write_bytes(shard("a"))
    (tmp_path / "b.safetensors").symlink_to("b.safetensors")
    with pytest.raises(StorageError, match=r"b\.safetensors .*ELOOP"):
        opened(str(tmp_path))


def test_links_to_files_and_folders(tmp_path, opened):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(shard("a"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").symlink_to("../blobs/x")
    (tmp_path / "model" / "folder.safetensors").symlink_to("../blobs")
    assert opened(str(tmp_path / "model")).names == ("a",)


def test_an_upload_under_way(tmp_path, s3_credentials, opened):
    uri = "s3://upload-under-way/model"
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    weight_map = {f"t{number}": file for number, file in enumerate(files)}
    # As the AWS command line uploads a folder: shards in any order, the index json last.
    for number, file in enumerate(files):
        (tmp_path / file).write_bytes(shard(f"t{number}"))
        s3_credentials.upload_folder(tmp_path, "upload-under-way", "model")
        if file != files[-1]:
            with pytest.raises(ObjectMissingError, match=f"{uri} is incomplete: .* missing"):
                opened(uri)
    assert opened(uri).names == ("t0", "t1", "t2")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    s3_credentials.upload_folder(tmp_path, "upload-under-way", "model")
    assert opened(uri).found_by == "index"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_model-00001-of-00002.safetensors"], "'adapter_model-00002-of-00002.safetensors'"),
        (["adapter_model.safetensors", "adapter_model.safetensors.aria2"], "not completely written"),
        (["adapter_model.safetensors.incomplete"], "'adapter_model.safetensors' is not completely written"),
    ],
)
def test_an_adapter_lacks_what_its_names_tell_of(names: list[str], said: str) -> None:
    with pytest.raises(ObjectMissingError, match=f"m is incomplete: .*{said}"):
        adapter_files_of([*names, "adapter_config.json"], uri="m")


def test_an_adapter_in_several_files_is_opened_by_its_own_index_json(place, opened):
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {"a": names[0], "b": names[1]}
    files = {
        names[0]: shard("a"),
        names[1]: shard("b"),
        "adapter_config.json": b'{"peft_type": "LORA"}',
        "adapter_model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
    }
    assert opened(place(files)).names == ("a", "b")


def test_an_index_json_tells_what_an_adapter_lacks(place, opened):
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    files = {names[0]: shard("a"), "adapter_config.json": b"{}", "adapter_model.safetensors.index.json": index}
    with pytest.raises(ObjectMissingError, match=names[1]):
        opened(place(files))


def test_a_component_has_its_usual_files_and_no_variants() -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    variants = ["model.fp16.safetensors", "model.fp16-00001-of-00003.safetensors", "other.safetensors"]
    assert component_files_of([*names, *variants], uri="m/vae") == names
    assert component_files_of(["diffusion_pytorch_model.safetensors", *names], uri="m/vae") == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert component_files_of(variants, uri="m/vae") == []
    with pytest.raises(ObjectMissingError, match=r"m/vae is incomplete: .*model-00002-of-00002"):
        component_files_of([names[0], *variants], uri="m/vae")


def test_a_link_that_leads_nowhere_is_told(tmp_path, opened):
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(ObjectMissingError, match=r"is a link to \.\./\.\./blobs/gone, which does not exist"):
        opened(str(tmp_path / "model.safetensors"))


def test_files_that_nothing_names_beside_the_one_of_the_usual_name_are_told(caplog):
    assert shard_files_of(["model.safetensors", "head.safetensors", "consolidated.safetensors"], uri="s3://b/m") == [
        "model.safetensors"
    ]
    (record,) = caplog.records
    assert record.getMessage() == (
        "s3://b/m: only model.safetensors is read; no index json names head.safetensors beside it"
    )
    assert shard_files_of(["a.safetensors", "b.safetensors"], uri="s3://b/m") == ["a.safetensors", "b.safetensors"]
    assert len(caplog.records) == 1
