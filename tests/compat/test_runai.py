"""What a script written for Run:ai's streamer sees, with its import replaced: values, errors, limits, files.

What is expected here was seen of version 0.17.0 with the same files; where this package differs, the test says so.
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_streamer.compat.runai import (
    CorruptedFileError,
    DistributedStreamer,
    FileAccessError,
    FileChunks,
    FileStreamer,
    ObjectStorageModel,
    RunaiStreamerInvalidInputException,
    RunaiStreamerMemoryLimitException,
    S3Credentials,
    SafetensorsStreamer,
    UnusableDeviceError,
    list_safetensors,
    pull_files,
)
from ray_streamer.errors import RayStreamerError, SettingsError, StorageError
from ray_streamer.testing.possessions import descriptors

LARGEST_BYTES = 40_000
LIMIT = "RUNAI_STREAMER_MEMORY_LIMIT"


def contents():
    torch.manual_seed(0)
    bits = torch.randint(0, 255, (64, 50), dtype=torch.uint8)
    return {
        "a": {
            "bf16": torch.randn(100, 64).to(torch.bfloat16),
            "empty": torch.zeros(0, 4),
            "f8": bits.view(torch.float8_e4m3fn),
            "scalar": torch.tensor(3.5),
        },
        "b": {"f32": torch.randn(1000, 10), "u8": torch.arange(7, dtype=torch.uint8), "i64": torch.arange(5)},
        "again": {"bf16": torch.ones(3, 3)},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runai")
    for name, tensors in contents().items():
        save_file(tensors, folder / f"{name}.safetensors")
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-100])
    (folder / "longer.safetensors").write_bytes(whole + b"xx")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "junk.safetensors").write_bytes(b"not a safetensors file at all, really")
    (folder / "config.json").write_text("{}")
    (folder / "inner").mkdir()
    save_file({"inner": torch.ones(2)}, folder / "inner" / "c.safetensors")
    return folder


@pytest.fixture(scope="module")
def paths(folder):
    return [str(folder / "a.safetensors"), str(folder / "b.safetensors")]


def streamed(paths, **arguments):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, **arguments)
        return list(streamer.get_tensors())


def assert_same(found, expected):
    assert sorted(name for name, _ in found) == sorted(expected)
    for name, tensor in found:
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("limit", [None, "-1", "0", str(LARGEST_BYTES), "1000000"])
@pytest.mark.parametrize("owned", [True, False])
def test_every_tensor_under_every_limit(paths, monkeypatch, limit, owned):
    if limit is not None:
        monkeypatch.setenv(LIMIT, limit)
    expected = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, owned=owned)
        # Without ownership a tensor is good until the next one is asked for.
        found = [(name, tensor if owned else tensor.clone()) for name, tensor in streamer.get_tensors()]
    assert_same(found, expected)


def test_a_tensor_that_is_kept_keeps_nothing_else(paths):
    assert [tensor.untyped_storage().nbytes() for _, tensor in streamed(paths)] == [
        tensor.nbytes for _, tensor in streamed(paths)
    ]


def test_memory_is_used_again_where_tensors_are_not_owned(tmp_path, monkeypatch):
    """Equal sizes, one at a time: with ownership every tensor has an address of its own, without it all share two."""
    save_file({f"{number}": torch.full((512, 1024), float(number)) for number in range(6)}, tmp_path / "m.safetensors")
    monkeypatch.setenv(LIMIT, str(4 * 2 * 1024 * 1024))

    def addresses(*, owned):
        kept, found = [], set()
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(tmp_path / "m.safetensors")], owned=owned)
            for name, tensor in streamer.get_tensors():
                assert torch.all(tensor == float(name))
                kept.append(tensor)
                found.add(tensor.data_ptr())
        return len(found)

    assert addresses(owned=True) == 6
    assert addresses(owned=False) < 6


def test_one_tensor_at_a_time_is_all_that_limit_0_reads(tmp_path, monkeypatch):
    save_file({f"{number}": torch.full((1000,), float(number)) for number in range(5)}, tmp_path / "m.safetensors")
    from ray_streamer.storage.posix import PosixStorage

    reads = []
    inner = PosixStorage.read_into

    def read_into(self, path, extent, buffer, **keywords):
        reads.append(extent)
        return inner(self, path, extent, buffer, **keywords)

    monkeypatch.setattr(PosixStorage, "read_into", read_into)
    monkeypatch.setenv(LIMIT, "0")
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(tmp_path / "m.safetensors")])
        counts = [len(reads) for _ in streamer.get_tensors()]
    assert counts == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", ["1", str(LARGEST_BYTES - 1), "-2"])
def test_a_limit_below_the_largest_tensor_is_refused(paths, monkeypatch, limit):
    monkeypatch.setenv(LIMIT, limit)
    with pytest.raises(RunaiStreamerMemoryLimitException, match=LIMIT):
        streamed(paths)


def test_what_a_streamer_says_of_its_files(paths):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        assert streamer.total_size == sum(t.nbytes for path in paths for t in load_file(path).values())
        for number, path in enumerate(paths):
            with open(path, "rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            header.pop("__metadata__", None)
            assert {
                each.name: {
                    "dtype": each.dtype,
                    "shape": each.shape,
                    "data_offsets": [each.offsets.start, each.offsets.end],
                }
                for each in streamer.files_to_tensors_metadata[number]
            } == header
        assert streamer.device_str == "cpu"
        list(streamer.get_tensors())


def test_files_that_repeat_and_names_that_repeat(folder, paths):
    again = str(folder / "again.safetensors")
    found = streamed([paths[0], again, paths[0]])
    assert [tuple(tensor.shape) for name, tensor in found if name == "bf16"] == [(100, 64), (3, 3), (100, 64)]
    assert streamed([]) == []


def test_chosen_names(folder, paths):
    for names in (["bf16", "f32"], {"bf16", "f32"}, ("bf16", "f32", "bf16")):
        assert [name for name, _ in streamed(paths, tensor_names=names)] == ["bf16", "f32"]
    with pytest.raises(ValueError, match="empty"):
        streamed(paths, tensor_names=[])
    with pytest.raises(ValueError, match="one text"):
        streamed(paths, tensor_names="bf16")
    with pytest.raises(ValueError, match=r"not found.*nope"):
        streamed(paths, tensor_names=["bf16", "nope"])
    with pytest.raises(ValueError, match=r"more than one file.*bf16"):
        streamed([paths[0], str(folder / "again.safetensors")], tensor_names=["bf16"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", FileAccessError),
        ("truncated", CorruptedFileError),
        ("longer", CorruptedFileError),
        ("empty", CorruptedFileError),
        ("junk", CorruptedFileError),
    ],
)
def test_what_is_wrong_with_a_file_is_a_value_error_that_names_it(folder, name, error):
    with pytest.raises(ValueError, match=rf"{name}\.safetensors") as raised:
        streamed([str(folder / f"{name}.safetensors")])
    assert isinstance(raised.value, error)
    assert isinstance(raised.value, RayStreamerError)
    assert isinstance(raised.value.__cause__, RayStreamerError)


def test_arguments_that_cannot_be_used(folder, paths, monkeypatch):
    with pytest.raises(ValueError, match="stream_file"):
        streamed(paths[0])
    with pytest.raises(RunaiStreamerInvalidInputException, match="nonsense"):
        streamed(paths, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda:0") as raised:
            streamed(paths, device="cuda:0")
        assert isinstance(raised.value, UnusableDeviceError)
    with pytest.raises(RunaiStreamerInvalidInputException, match="file, s3"):
        streamed([paths[0], "s3://bucket/b.safetensors"])
    for value in ("0", "-1", "many"):
        monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", value)
        with pytest.raises(ValueError, match="RUNAI_STREAMER_CONCURRENCY"):
            streamed(paths)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"device": 3.5}, "unusable device 3.5", id="device"),
        pytest.param({"s3_credentials": "key"}, "S3Credentials, got str", id="credentials"),
        pytest.param({"tensor_names": 3}, "tensor_names is a list of str, got int", id="names"),
        pytest.param({"tensor_names": ["bf16", 3]}, "tensor_names is a list of str, got int in it", id="a-name"),
        pytest.param({"tensor_names": [["bf16"]]}, "got list in it", id="names-of-names"),
    ],
)
def test_arguments_of_another_kind_are_named(paths, arguments, said):
    with pytest.raises(SettingsError, match=said):
        streamed(paths, **arguments)
    with pytest.raises(SettingsError, match="paths is a list of paths, got NoneType"):
        streamed(None)


@pytest.mark.parametrize("wrong", [0.5, "0", None, True, [0]])
def test_numbers_of_bytes_are_whole(paths, wrong):
    for offsets, sizes in (([wrong], [8]), ([0], [wrong])):
        with pytest.raises(SettingsError, match="whole number"):
            FileChunks(0, paths[0], offsets, sizes)
    if wrong is not None:
        with pytest.raises(SettingsError, match="memory_limit is a whole number"):
            chunks([FileChunks(0, paths[0], [0], [8])], memory_limit=wrong)
    assert FileChunks(0, paths[0], torch.arange(2).numpy(), [8, 9]).offsets == [0, 1]


@pytest.mark.parametrize("wrong", [None, 8, "8", [0.5], [True]])
def test_sizes_of_ranges_in_a_row_are_whole_numbers(paths, wrong):
    with pytest.raises(SettingsError, match="sizes"):
        FileChunks.contiguous(0, paths[0], 0, wrong)
    with pytest.raises(SettingsError, match="offset is a whole number"):
        FileChunks.contiguous(0, paths[0], "0", [8])


def test_a_limit_that_is_refused_leaves_no_file_open(folder, paths, monkeypatch):
    monkeypatch.setenv(LIMIT, "1")
    with pytest.raises(RunaiStreamerMemoryLimitException, match="a memory limit of 1 byte cannot hold"):
        streamed(paths)
    assert not [place for place in descriptors() if place.startswith(str(folder))]


def test_one_stream_after_the_other(paths):
    with SafetensorsStreamer() as streamer:
        assert list(streamer.get_tensors()) == []
        streamer.stream_files(paths)
        with pytest.raises(ValueError, match="taken to its end"):
            streamer.stream_files(paths)
        assert len(list(streamer.get_tensors())) == 7
        assert list(streamer.get_tensors()) == []
        streamer.stream_file(paths[0])
        tensors = streamer.get_tensors()
        next(tensors)
        tensors.close()
        streamer.stream_file(paths[1])
        assert len(list(streamer.get_tensors())) == 3
        streamer.stream_file(paths[1])
    with pytest.raises(ValueError, match="not open"):
        list(streamer.get_tensors())
    with pytest.raises(ValueError, match="not open"):
        SafetensorsStreamer().stream_files(paths)


def chunks(requests, streamer_type=FileStreamer, **arguments):
    with streamer_type() as streamer:
        streamer.stream_files(requests, **arguments)
        return list(streamer.get_chunks())


def test_raw_ranges(paths):
    requests = [FileChunks(7, paths[0], [100, 0, 4], [50, 8, 0]), FileChunks.contiguous(9, paths[1], 8, [5, 6000])]
    assert (requests[0].total_size(), requests[0].max_chunk_size()) == (58, 50)
    with open(paths[0], "rb") as a, open(paths[1], "rb") as b:
        first, second = a.read(), b.read()
    expected = {
        (7, 0): first[100:150],
        (7, 1): first[:8],
        (7, 2): b"",
        (9, 0): second[8:13],
        (9, 1): second[13:6013],
    }
    for limit in (None, -1, 0, 6000, 1 << 20):
        found = chunks(requests, memory_limit=limit)
        assert {(request, number): bytes(chunk.numpy().tobytes()) for request, number, chunk in found} == expected
        assert all(chunk.dtype == torch.uint8 and chunk.shape[0] == 1 for _, _, chunk in found)
    distributed = {"credentials": None, "device": "cpu", "is_distributed": True}
    assert len(chunks(requests, DistributedStreamer, **distributed)) == 5


def test_raw_ranges_that_cannot_be(folder, paths):
    with pytest.raises(RunaiStreamerMemoryLimitException, match="which has 8"):
        chunks([FileChunks(0, paths[0], [0], [8])], memory_limit=4)
    with pytest.raises(ValueError, match="not in the file"):
        chunks([FileChunks(0, paths[0], [0], [10**7])])
    with pytest.raises(ValueError, match="nothing"):
        chunks([FileChunks(0, str(folder / "nothing.bin"), [0], [8])])
    with pytest.raises(ValueError, match="2 offsets and 1 sizes"):
        FileChunks(0, paths[0], [0, 8], [8])
    for wrong in (None, [paths[0]]):
        with pytest.raises(ValueError, match="file_stream_requests is a list of FileChunks"):
            chunks(wrong)
    with pytest.raises(ValueError, match="nothing"), FileStreamer() as streamer:
        streamer.list_files(str(folder / "nothing"))


def test_local_folders(folder, tmp_path):
    names = ["a", "again", "b", "empty", "junk", "longer", "truncated"]
    expected = [str(folder / f"{name}.safetensors") for name in names]
    assert list_safetensors(str(folder)) == expected
    assert list_safetensors(f"{folder}/") == expected
    assert list_safetensors(f"file://{folder}") == expected
    assert list_safetensors(str(folder / "nothing")) == []
    with FileStreamer() as streamer:
        found = streamer.list_files(str(folder), allow_patterns=["*.json"])
        assert found == [(str(folder / "config.json"), 2)]
        assert len(streamer.list_files(str(folder))) == 9
        assert len(streamer.list_files(str(folder), is_recursive=False)) == 8
    with pytest.raises(NotImplementedError):
        pull_files(str(folder), str(tmp_path))
    with pytest.raises(ValueError, match="object store"):
        ObjectStorageModel(str(folder), str(tmp_path))


def test_paths_may_be_path_objects_and_begin_at_home(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = list_safetensors(str(folder))
    for path in (folder, f"~/{folder.name}"):
        assert list_safetensors(path) == expected
        with FileStreamer() as streamer:
            assert streamer.list_files(path, allow_patterns="*.json") == [(str(folder / "config.json"), 2)]
        with pytest.raises(NotImplementedError, match="is a local folder"):
            pull_files(path, str(tmp_path))
        with pytest.raises(SettingsError, match="in no object store"):
            ObjectStorageModel(path, str(tmp_path))
    with ObjectStorageModel("s3://bucket/model", "~/copy") as model:
        assert model.dir == str(folder.parent / "copy")


@pytest.mark.parametrize("wrong", [None, 5, b"s3://bucket/model", ["s3://bucket/model"], ""])
def test_what_is_no_path_is_said(tmp_path, wrong):
    for call in (
        list_safetensors,
        FileStreamer().list_files,
        lambda path: pull_files(path, str(tmp_path)),
        lambda path: ObjectStorageModel(path, str(tmp_path)),
        lambda path: ObjectStorageModel("s3://bucket/model", path),
    ):
        with pytest.raises(SettingsError, match=r"a uri is text or a path|an empty path"):
            call(wrong)
    with pytest.raises(SettingsError, match="s3://bucket/copy is no local folder"):
        ObjectStorageModel("s3://bucket/model", "s3://bucket/copy")


@pytest.fixture(scope="module")
def bucket(folder, s3_server):
    return s3_server.upload_folder(str(folder), "compat-runai", "model")


def test_objects(folder, paths, bucket, s3_server):
    """Credentials of the call: the environment has none here."""
    credentials = S3Credentials(
        s3_server.access_key, s3_server.secret_key, None, s3_server.region, s3_server.endpoint_url
    )
    assert s3_server.secret_key not in repr(credentials)
    names = ["a", "again", "b", "empty", "junk", "longer", "truncated"]
    assert list_safetensors(bucket, credentials) == [f"{bucket}/{name}.safetensors" for name in names]
    assert list_safetensors(f"{bucket}-not", credentials) == []
    expected = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert_same(streamed([f"{bucket}/a.safetensors", f"{bucket}/b.safetensors"], s3_credentials=credentials), expected)
    with pytest.raises(FileAccessError, match=r"missing\.safetensors"):
        streamed([f"{bucket}/missing.safetensors"], s3_credentials=credentials)
    with pytest.raises(StorageError, match="no-such-bucket"):
        list_safetensors("s3://no-such-bucket/model", credentials)


def test_files_of_a_model_come_once(bucket, s3_credentials, tmp_path):
    pulled = tmp_path / "pulled"
    pull_files(bucket, str(pulled), ignore_pattern=["*.safetensors"])
    pull_files(bucket, str(pulled), allow_pattern=["*/c.safetensors"])
    pull_files(bucket, str(pulled), allow_pattern=["*.nothing"])
    pull_files(f"{bucket}-not", str(pulled))
    assert sorted(path.name for path in pulled.rglob("*.*")) == ["c.safetensors", "config.json"]
    for patterns in (["*.json"], ["a.*"]):
        with ObjectStorageModel(bucket, str(tmp_path / "model")) as model:
            model.pull_files(allow_pattern=patterns)
            # The first one completed the folder.
            assert sorted(path.name for path in (tmp_path / "model").iterdir() if path.name[0] != ".") == [
                "config.json"
            ]
    assert model.dir == str(tmp_path / "model")
