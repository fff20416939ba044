"""Opening whole checkpoints: which files, how many reads, and every way in which it must fail."""

from __future__ import annotations

import json
import math
import pickle
import re
import threading

import numpy as np
import pytest
import safetensors.numpy

from ray_streamer.checkpoint import CheckpointLocation, ShardFile, locate, open_checkpoint
from ray_streamer.errors import (
    AccessError,
    CheckpointError,
    CredentialsError,
    HeaderError,
    IndexMismatchError,
    ObjectMissingError,
)
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import (
    TensorSpec,
    llama_layout,
    serialize_header,
    tensor_content,
    write_checkpoint,
)

INDEX = "model.safetensors.index.json"
SMALL = llama_layout(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=130)


def shard(*specs: tuple[str, str, tuple[int, ...]]) -> bytes:
    tensors = [TensorSpec(*spec) for spec in specs]
    return serialize_header(tensors) + bytes(sum(spec.num_bytes for spec in tensors))


def index_json(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


A, B = ("a", "F32", (2,)), ("b", "U8", (3,))
TWO_FILES = {"1.safetensors": shard(A), "2.safetensors": shard(B)}


@pytest.fixture
def opened(recording):
    """Opens a checkpoint uri with the storage that belongs to it."""
    return lambda uri, **options: open_checkpoint(uri, recording(locate(uri).folder_uri), **options)


# Which files


def test_split_checkpoint_agrees_with_safe_open(tmp_path, place, opened):
    folder = write_checkpoint(tmp_path / "source", SMALL.tensors, num_files=3, seed=5, config=SMALL.config)
    files = written(folder)
    index = opened(place(files))
    assert [file.path for file in index.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [file.size_bytes for file in index.files] == [len(files[file.path]) for file in index.files]
    assert index.config == SMALL.config
    assert index.metadata == {"format": "pt"}
    assert index.total_bytes == SMALL.total_bytes
    assert sorted(index.names) == sorted(spec.name for spec in SMALL.tensors)
    for file_id, file in enumerate(index.files):
        with safetensors.safe_open(folder / file.path, framework="pt") as oracle:
            rows = np.flatnonzero(index.file_ids == file_id).tolist()
            assert [index.names[row] for row in rows] == oracle.offset_keys()
            for row in rows:
                view = oracle.get_slice(index.names[row])
                assert (list(index.shape_of(row)), index.dtype_of(row).name) == (view.get_shape(), view.get_dtype())
    for spec in SMALL.tensors:
        row = index.position(spec.name)
        extent = index.extent_of(row)
        stored = files[index.files[index.file_ids[row]].path][extent.start : extent.stop]
        assert stored == tensor_content(spec, seed=5)


def test_rows_are_sorted_by_file_and_offset(tmp_path, place, opened):
    index = opened(place(written(write_checkpoint(tmp_path / "source", SMALL.tensors, num_files=4))))
    rows = list(zip(index.file_ids.tolist(), index.starts.tolist(), strict=True))
    assert rows == sorted(rows)


def test_index_json_names_the_files_and_others_are_left_alone(place, opened):
    files = TWO_FILES | {"consolidated.safetensors": b"broken", "other.safetensors": b"broken"}
    uri = place(files | {INDEX: index_json({"a": "1.safetensors", "b": "2.safetensors"})})
    assert opened(uri).names == ("a", "b")


def test_single_file_wins_over_others_without_index(place, opened):
    assert opened(place({"model.safetensors": shard(A), "other.safetensors": shard(B)})).names == ("a",)


@pytest.fixture
def parts():
    """A folder as two ranks leave it that save with `HuggingFaceStorageWriter(save_distributed=True)`; 'a' is cut in two."""
    offsets = [{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0]}}, {"a": {"saved_offsets": [1]}}]
    tensors = [{"a": np.zeros(1, np.float32), "b": np.zeros(3, np.uint8)}, {"a": np.ones(1, np.float32)}]
    names = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    return {
        name: safetensors.numpy.save(part, {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0"})
        for name, part, where in zip(names, tensors, offsets, strict=True)
    }


@pytest.mark.parametrize("have", ["all", "one", "index", "uri"])
def test_files_with_parts_of_tensors_are_not_taken_for_whole_ones(parts, place, opened, have):
    last = max(parts)
    files = {"all": parts, "index": {**parts, INDEX: index_json({"a": last, "b": min(parts)})}}.get(
        have, {last: parts[last]}
    )
    with pytest.raises(CheckpointError, match=r"holds parts of tensors.*enable_consolidation=True"):
        opened(f"{place(files)}/{last}" if have == "uri" else place(files))


def test_without_index_all_files_count_but_consolidated_ones(place, opened):
    files = TWO_FILES | {"consolidated.00.safetensors": shard(A), "notes.txt": b"", "sub/3.safetensors": shard(A)}
    assert opened(place(files)).names == ("a", "b")


def test_one_file_by_its_own_uri(place, opened):
    uri = place(TWO_FILES | {"config.json": b'{"model_type": "llama"}', INDEX: b"broken"})
    index = opened(f"{uri}/2.safetensors")
    assert index.names == ("b",)
    assert index.uri == uri
    assert index.config == {"model_type": "llama"}


def test_one_index_json_by_its_own_uri(place, opened):
    uri = place(TWO_FILES | {"part.safetensors.index.json": index_json({"b": "2.safetensors"}), INDEX: b"broken"})
    assert opened(f"{uri}/part.safetensors.index.json").names == ("b",)


def test_index_json_may_name_files_in_folders_below(place, opened):
    uri = place({"sub/1.safetensors": shard(A), INDEX: index_json({"a": "sub/1.safetensors"})})
    assert opened(uri).files[0].path == "sub/1.safetensors"


def test_trailing_slash_and_file_scheme(tmp_path, opened):
    folder = write_checkpoint(tmp_path / "with space", [A, B])
    for uri in (f"{folder}/", f"file://{str(folder).replace(' ', '%20')}", f"{folder}/model.safetensors"):
        assert len(opened(uri)) == 2


def test_s3(tmp_path, s3_credentials):
    folder = write_checkpoint(tmp_path / "source", SMALL.tensors, num_files=2, config=SMALL.config)
    uri = s3_credentials.upload_folder(folder, "open-checkpoint", "some/model")
    storage = open_storage(uri, Settings.resolve())
    try:
        index = open_checkpoint(uri, storage, head_bytes=64)
        one = open_checkpoint(f"{uri}/model-00002-of-00002.safetensors", storage)
    finally:
        storage.close()
    local_storage = open_storage(str(folder), Settings.resolve())
    local = open_checkpoint(str(folder), local_storage)
    local_storage.close()
    assert index.names == local.names
    assert index.config == SMALL.config
    assert (index.starts == local.starts).all()
    assert [file.size_bytes for file in index.files] == [file.size_bytes for file in local.files]
    assert set(one.names) < set(index.names)
    missing = open_storage("s3://open-checkpoint/none", Settings.resolve())
    with pytest.raises(ObjectMissingError, match=r"none.*(nothing is there|no such).*bucket and prefix"):
        open_checkpoint("s3://open-checkpoint/none", missing)
    missing.close()


@pytest.mark.parametrize(
    ("uri", "folder", "selection"),
    [
        ("/models/llama", "/models/llama", None),
        ("models", "models", None),
        ("/models/llama/", "/models/llama/", None),
        ("/models/llama/model.safetensors", "/models/llama", "model.safetensors"),
        ("/model.safetensors", "/", "model.safetensors"),
        ("model.safetensors", ".", "model.safetensors"),
        ("file:///model.safetensors", "file:///", "model.safetensors"),
        ("file:///models/x.json", "file:///models", "x.json"),
        ("s3://bucket", "s3://bucket", None),
        ("s3://bucket/", "s3://bucket/", None),
        ("s3://bucket/model.safetensors", "s3://bucket", "model.safetensors"),
        ("s3://bucket/a/model.safetensors.index.json", "s3://bucket/a", "model.safetensors.index.json"),
        ("s3://odd.safetensors", "s3://odd.safetensors", None),
        ("memory://tiny", "memory://tiny", None),
        ("memory://tiny.json", "memory://tiny.json", None),
        ("memory://tiny/1.safetensors", "memory://tiny", "1.safetensors"),
    ],
)
def test_locate(uri, folder, selection):
    assert locate(uri) == CheckpointLocation(folder, selection)


# How many reads


def test_one_read_per_file_and_no_tensor_byte(tmp_path, place, recording):
    uri = place(written(write_checkpoint(tmp_path / "source", SMALL.tensors, num_files=3)))
    storage = recording(uri)
    open_checkpoint(uri, storage)
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(storage.heads) == sorted([INDEX, "config.json", *shards])
    assert storage.ranges == []


@pytest.mark.parametrize("head_bytes", [8, 9, 100])
def test_a_longer_header_costs_one_more_read_that_ends_with_the_header(place, recording, head_bytes):
    data = shard(*((f"t{number}", "U8", (5,)) for number in range(50)))
    uri = place({"model.safetensors": data})
    storage = recording(uri)
    index = open_checkpoint(uri, storage, head_bytes=head_bytes)
    assert len(index) == 50
    header_stop = 8 + int.from_bytes(data[:8], "little")
    assert storage.ranges == [("model.safetensors", Extent(head_bytes, header_stop))]


def test_a_header_that_ends_with_the_head_costs_no_more_read(place, recording):
    data = shard(A)
    uri = place({"model.safetensors": data})
    storage = recording(uri)
    open_checkpoint(uri, storage, head_bytes=8 + int.from_bytes(data[:8], "little"))
    assert storage.ranges == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_headers_are_read_in_parallel_up_to_concurrency(place, recording, concurrency):
    uri = place({f"{number}.safetensors": shard((f"t{number}", "U8", (1,))) for number in range(6)})
    storage = recording(uri)
    read_head, lock, in_flight, peaks = storage.read_head, threading.Lock(), [], []
    # Opens only when as many heads as allowed are in flight at once.
    meeting = threading.Barrier(concurrency, timeout=30)

    def read_with_others(path: str, max_bytes: int):
        if not path.endswith(".safetensors"):
            return read_head(path, max_bytes)
        with lock:
            in_flight.append(path)
            peaks.append(len(in_flight))
        meeting.wait()
        with lock:
            in_flight.remove(path)
        return read_head(path, max_bytes)

    storage.read_head = read_with_others
    assert len(open_checkpoint(uri, storage, concurrency=concurrency)) == 6
    assert max(peaks) == concurrency


# Failures: places


def test_missing_folder(tmp_path, opened):
    with pytest.raises(ObjectMissingError, match=r"no-such.*check the path"):
        opened(str(tmp_path / "no-such"))
    with pytest.raises(ObjectMissingError, match="check the path"):
        opened("memory://no-such")


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.json"])
def test_missing_selected_file(place, opened, name):
    uri = place(TWO_FILES)
    with pytest.raises(ObjectMissingError, match=re.escape(f"{uri}/{name}")):
        opened(f"{uri}/{name}")


def test_empty_folder_says_what_was_looked_for(tmp_path, opened):
    with pytest.raises(ObjectMissingError, match=r"nothing is there; looked for model.safetensors.index.json, .*\*"):
        opened(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "only pytorch_model.bin; convert"),
        (["model.pt"], "only model.pt; convert"),
        (["llama.Q4_K_M.gguf"], "only llama.Q4_K_M.gguf; convert"),
        (["consolidated.safetensors", "params.json"], "only consolidated.safetensors, .* one file"),
        (["README.md"], "only README.md; is the checkpoint in another folder"),
        ([f"{n}.bin" for n in range(9)], r"0.bin, 1.bin, 2.bin, 3.bin, 4.bin and 4 more; convert"),
    ],
)
def test_folder_of_another_format_gets_a_hint(place, opened, names, hint):
    with pytest.raises(CheckpointError, match=hint):
        opened(place(dict.fromkeys(names, b"x")))


# Failures: json files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"{", "not valid JSON", id="truncated"),
        pytest.param(b"\xff", "not UTF-8", id="not-utf8"),
        pytest.param(b"[]", "must be a JSON object, got list", id="list"),
        pytest.param(b"[" * 5000 + b"]" * 5000, "recursion", id="deep"),
        pytest.param(b"{}", "must have an object 'weight_map' .* got NoneType", id="no-weight-map"),
        pytest.param(index_json([]), "must have an object 'weight_map' .* got list", id="weight-map-list"),
        pytest.param(index_json({}), "names no tensor", id="weight-map-empty"),
        pytest.param(index_json({"a": 1}), "file name for 'a', got int", id="weight-map-number"),
        pytest.param(b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', "'a' appears 2", id="repeated"),
        pytest.param(index_json({"a": "1.bin"}), r"'1.bin' must end in .safetensors; convert", id="bin"),
    ],
)
def test_malformed_index_json(place, recording, content, message):
    uri = place(TWO_FILES | {INDEX: content})
    storage = recording(uri)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(uri, storage)
    assert str(caught.value).startswith(f"{uri}/{INDEX}")
    assert storage.heads == [INDEX]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "a/../x.safetensors",
        "..",
        ".",
        "",
        "./",
        "./.",
        "./../x.safetensors",
        "a/./../x.safetensors",
        ".//x.safetensors",
        "./~/x.safetensors",
        "./C:/x.safetensors",
        "a//x.safetensors",
        "/etc/x.safetensors",
        "//host/x.safetensors",
        "a/",
        "..\\x.safetensors",
        "\\\\host\\x.safetensors",
        "a\\..\\x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "s3://other/x.safetensors",
        "file:///etc/x.safetensors",
        "http://host/x.safetensors",
        "~/x.safetensors",
        "~root/x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "x\x7f.safetensors",
    ],
)
def test_file_names_that_leave_the_folder_are_refused_before_any_read(place, recording, name):
    uri = place(TWO_FILES | {INDEX: index_json({"a": "1.safetensors", "b": name})})
    storage = recording(uri)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: file name .* must"):
        open_checkpoint(uri, storage)
    assert storage.heads == [INDEX]


def test_half_a_surrogate_pair_in_a_file_name_is_refused(place, opened):
    uri = place({INDEX: b'{"weight_map":{"a":"\\ud800.safetensors"}}'})
    with pytest.raises(CheckpointError, match="surrogate"):
        opened(uri)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", b"[" * 5000 + b"]" * 5000], ids=["cut", "list", "utf8", "deep"]
)
def test_malformed_config(place, opened, content):
    with pytest.raises(CheckpointError, match=r"/config\.json (is not valid JSON|must be a JSON object)"):
        opened(place({"model.safetensors": shard(A), "config.json": content}))


def test_config_may_hold_infinity_as_transformers_writes_it(place, opened):
    uri = place({"model.safetensors": shard(A), "config.json": b'{"time_step_limit": [0.0, Infinity]}'})
    assert opened(uri).config == {"time_step_limit": [0.0, math.inf]}


def test_json_file_above_the_cap_is_refused_unread(tmp_path, opened):
    (tmp_path / INDEX).touch()
    with (tmp_path / INDEX).open("r+b") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(CheckpointError, match=r"100000001 bytes\), above the cap"):
        opened(str(tmp_path))


# Failures: files against index


def test_files_of_the_index_that_do_not_exist_are_counted(place, opened):
    weight_map = {f"t{n}": f"{n}.safetensors" for n in range(3, 12)} | {"a": "1.safetensors"}
    with pytest.raises(
        ObjectMissingError, match=r"index\.json names 10 files, of which 9 do not exist: '10\.safet.* 4 more"
    ):
        opened(place(TWO_FILES | {INDEX: index_json(weight_map)}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        pytest.param(
            {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
            r"1 tensor is in no header: 'c' \(in 2\.safetensors\)",
            id="missing",
        ),
        pytest.param(
            {"a": "1.safetensors", "c": "2.safetensors"},
            r"'c' \(in 2\.safetensors\); 1 tensor is not in the index: 'b' \(in 2\.safetensors\)",
            id="extra",
        ),
        pytest.param(
            {"a": "2.safetensors", "b": "1.safetensors"},
            r"2 tensors are in another file: 'a' \(in 1\.safetensors, not in 2\.safetensors\), 'b'",
            id="moved",
        ),
        pytest.param(
            {"a": "1.safetensors", "b": "2.safetensors"} | {f"c{n}": "1.safetensors" for n in range(9)},
            r"9 tensors are in no header: 'c0' .* 'c4' \(in 1\.safetensors\) and 4 more",
            id="many",
        ),
        pytest.param(
            {"a": "./1.safetensors", "b": "2.safetensors"},
            r"1 file name with '\.' components: '\./1\.safetensors'",
            id="dotted",
        ),
    ],
)
def test_index_and_headers_disagree(place, opened, caplog, weight_map, message):
    uri = place(TWO_FILES | {INDEX: index_json(weight_map)})
    with pytest.raises(IndexMismatchError, match=message) as caught:
        opened(uri, strict_index=True)
    assert str(caught.value).startswith(f"{uri}/{INDEX} and the headers")
    # Without the setting the same is one warning, and what headers have is there.
    assert not caplog.records
    assert opened(uri).names == ("a", "b")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(message, record.getMessage())
    assert "strict_index" in record.getMessage()


def test_a_single_file_that_the_index_does_not_name_is_told(place, opened, caplog):
    files = TWO_FILES | {INDEX: index_json({"a": "1.safetensors", "b": "2.safetensors"})}
    uri = place(files | {"model.safetensors": shard(("c", "F32", (2,)))})
    assert opened(uri).names == ("a", "b")
    (record,) = caplog.records
    assert f"{INDEX} is read, and not model.safetensors beside it" in record.getMessage()
    caplog.clear()
    assert opened(f"{uri}/{INDEX}").names == ("a", "b")
    assert opened(f"{uri}/model.safetensors").names == ("c",)
    assert not caplog.records


def test_a_single_file_that_the_index_names_is_no_warning(place, opened, caplog):
    uri = place({"model.safetensors": shard(A), INDEX: index_json({"a": "model.safetensors"})})
    assert opened(uri).names == ("a",)
    assert not caplog.records


def test_an_index_that_agrees_is_no_warning(place, opened, caplog):
    uri = place(TWO_FILES | {INDEX: index_json({"a": "1.safetensors", "b": "2.safetensors"})})
    index = opened(uri, strict_index=True)
    assert (index.found_by, index.absent, index.unlisted) == ("index", (), frozenset())
    assert not caplog.records


@pytest.mark.parametrize(
    ("weight_map", "taken_from"),
    [
        pytest.param({"b": "1.safetensors"}, "1.safetensors", id="the-first"),
        pytest.param({"b": "2.safetensors"}, "2.safetensors", id="the-second"),
        pytest.param({"b": "3.safetensors"}, "2.safetensors", id="neither"),
        pytest.param({}, "2.safetensors", id="not-named"),
    ],
)
def test_the_index_decides_where_a_tensor_of_two_files_is_taken_from(place, opened, caplog, weight_map, taken_from):
    # Of different shapes, as a rewritten file may have it.
    files = {
        "1.safetensors": shard(A, ("b", "U8", (3,)), ("x", "U8", (7,))),
        "2.safetensors": shard(("b", "U8", (5,)), ("y", "U8", (2,))),
        "3.safetensors": shard(("z", "U8", (1,))),
    }
    named = {"a": "1.safetensors", "x": "1.safetensors", "y": "2.safetensors", "z": "3.safetensors"}
    uri = place(files | {INDEX: index_json(named | weight_map)})
    index = opened(uri)
    assert sorted(index.names) == ["a", "b", "x", "y", "z"]
    row = index.position("b")
    assert index.files[index.file_ids[row]].path == taken_from
    assert index.shape_of(row) == ((3,) if taken_from == "1.safetensors" else (5,))
    for row, name in enumerate(index.names):
        data = files[index.files[index.file_ids[row]].path]
        extent = index.extent_of(row)
        assert extent.stop <= len(data), name
    assert "1 tensor is in two files: 'b' (taken from " + taken_from in caplog.text
    with pytest.raises(IndexMismatchError, match="in two files"):
        opened(uri, strict_index=True)


def test_absent_and_unlisted_names_travel_with_the_index(place, opened):
    uri = place(TWO_FILES | {INDEX: index_json({"a": "1.safetensors", "c": "2.safetensors"})})
    index = pickle.loads(pickle.dumps(opened(uri)))
    assert (index.absent, index.unlisted) == (("c",), frozenset({"b"}))


def test_a_tensor_in_two_files_without_an_index_to_decide(place, opened):
    files = {"1.safetensors": shard(A, B), "2.safetensors": shard(B)}
    with pytest.raises(CheckpointError, match=r"1 tensor is in two files: 'b' \(1\.safetensors and 2\.safetensors\)"):
        opened(place(files))


@pytest.mark.parametrize("ranks", [[0], [0, 1]])
@pytest.mark.parametrize(
    "index", [{}, {INDEX: index_json({"a": "model-00001-of-00001.safetensors"})}], ids=["", "index"]
)
def test_what_vllms_ranks_held_is_no_checkpoint(place, opened, ranks, index):
    """Parts have the names of whole tensors. vLLM's example copies the index json of the checkpoint beside them."""
    uri = place({f"model-rank-{rank}-part-0.safetensors": shard(A) for rank in ranks} | index)
    with pytest.raises(CheckpointError, match=r"model-rank-0-part-0\.safetensors .* --load-format sharded_state"):
        opened(uri)
    assert opened(f"{uri}/model-rank-0-part-0.safetensors").names == ("a",)


def test_a_checkpoint_beside_what_vllms_ranks_held_is_read(place, opened):
    beside = {"model-rank-0-part-0.safetensors": shard(A)}
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    assert opened(place(TWO_FILES | beside | {INDEX: index_json(weight_map)})).names == ("a", "b")


def test_truncated_file_names_the_file_and_the_missing_bytes(place, opened):
    uri = place(TWO_FILES | {"2.safetensors": shard(B)[:-2]})
    with pytest.raises(HeaderError, match=f"^{re.escape(uri)}/2.safetensors: 2 bytes are missing"):
        opened(uri)


def test_file_truncated_inside_its_header(place, opened):
    with pytest.raises(HeaderError, match=r"2\.safetensors: .* bytes are missing inside the header"):
        opened(place(TWO_FILES | {"2.safetensors": shard(B)[:20]}), head_bytes=8)


def test_empty_file(place, opened):
    with pytest.raises(HeaderError, match=r"2\.safetensors: .* the file has 0 bytes"):
        opened(place(TWO_FILES | {"2.safetensors": b""}))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_of_several_broken_files_the_first_by_path_is_reported(place, recording, concurrency):
    uri = place({f"{number}.safetensors": shard((f"t{number}", "U8", (1,))) for number in range(8)})
    for _ in range(5):
        storage = recording(uri)
        storage.failures = {f"{number}.safetensors": AccessError(f"file {number}") for number in (7, 5, 3)}
        with pytest.raises(AccessError, match="file 3"):
            open_checkpoint(uri, storage, concurrency=concurrency)


def test_access_error_of_the_index_is_not_taken_for_a_missing_index(place, recording):
    uri = place({"model.safetensors": shard(A)})
    storage = recording(uri)
    storage.failures = {INDEX: AccessError("refused")}
    with pytest.raises(AccessError, match="refused"):
        open_checkpoint(uri, storage)


REFUSED = AccessError("AccessDenied")


@pytest.mark.parametrize("where", ["", "/model.safetensors"])
def test_who_may_read_but_not_list_loads_a_single_file(place, recording, caplog, where):
    """S3 without s3:ListBucket answers 403 for what does not exist."""
    uri = place({"model.safetensors": shard(A)})
    storage = recording(uri)
    storage.failures = {INDEX: REFUSED, "config.json": REFUSED, "": REFUSED}
    index = open_checkpoint(uri + where, storage)
    assert (index.names, index.config) == (("a",), None)
    assert len(caplog.records) == (1 if where else 2)
    assert all("s3:ListBucket" in record.getMessage() for record in caplog.records)


def test_who_may_read_nothing_hears_so(place, recording):
    uri = place({"model.safetensors": shard(A)})
    storage = recording(uri)
    storage.failures = dict.fromkeys([INDEX, "config.json", "model.safetensors", ""], REFUSED)
    with pytest.raises(AccessError, match="AccessDenied"):
        open_checkpoint(uri, storage)


@pytest.mark.parametrize("name", [INDEX, "config.json", ""])
def test_missing_credentials_are_not_taken_for_a_refusal_and_looked_for_again(place, recording, name):
    """The search may take its whole limit."""
    uri = place({"model.safetensors": shard(A)})
    storage = recording(uri)
    storage.failures = {INDEX: REFUSED, "": REFUSED, name: CredentialsError("none in 60 s")}
    with pytest.raises(CredentialsError, match="none in 60 s"):
        open_checkpoint(uri, storage)


def test_a_config_that_is_refused_where_listing_is_allowed_is_refused(place, recording):
    uri = place({"model.safetensors": shard(A), "config.json": b"{}"})
    storage = recording(uri)
    storage.failures = {"config.json": REFUSED}
    with pytest.raises(AccessError, match="AccessDenied"):
        open_checkpoint(uri, storage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "config.json is nested deeper than 100 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json is not valid JSON: Exceeds the limit"),
        (b" " * (16 << 20) + b"{}", r"config.json has 16 MiB .*above the cap of 16 MiB$"),
    ],
    ids=["deep", "digits", "long"],
)
def test_config_that_no_reader_should_bear(place, opened, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(place({"model.safetensors": shard(A), "config.json": content}))
    assert len(str(caught.value)) < 400


# The index as a value


def test_shapes_are_padded_with_one_to_the_same_width_over_files(place, opened):
    files = {"1.safetensors": shard(("s", "U8", ())), "2.safetensors": shard(("c", "U8", (2, 3, 4)), ("z", "U8", (0,)))}
    index = opened(place(files))
    assert index.names == ("s", "c", "z")
    assert index.shapes.tolist() == [[1, 1, 1], [2, 3, 4], [0, 1, 1]]
    assert index.num_dims.tolist() == [0, 3, 1]
    assert index.shapes.prod(axis=1).tolist() == [1, 24, 0]


def test_pickle_round_trip(tmp_path, place, opened):
    files = written(write_checkpoint(tmp_path / "source", SMALL.tensors, num_files=3, config=SMALL.config))
    index = opened(place(files))
    copy = pickle.loads(pickle.dumps(index))
    assert copy.fingerprint() == index.fingerprint()
    assert (copy.uri, copy.files, copy.names, copy.config) == (index.uri, index.files, index.names, index.config)
    assert [copy.position(name) for name in copy.names] == list(range(len(copy)))
    assert not copy.starts.flags.writeable
    with pytest.raises(KeyError):
        copy.position("no.such.tensor")


def test_fingerprint_sees_every_part(tmp_path, opened):
    def fingerprint(name: str, *, tensors=(A, B), config=None, num_files=1):
        folder = write_checkpoint(tmp_path / name, tensors, num_files=num_files, config=config)
        index = opened(str(folder))
        # Etags of local files hold inode and time, so they are left out of the comparison.
        parts = {"uri": "same", "files": tuple(ShardFile(file.path, file.size_bytes, "") for file in index.files)}
        return type(index)(**(index.__reduce__()[1][0] | parts)).fingerprint()

    same = fingerprint("1")
    assert same == fingerprint("2")
    others = [
        fingerprint("3", config={"x": 1}),
        fingerprint("4", num_files=2),
        fingerprint("5", tensors=(A, ("c", "U8", (3,)))),
        fingerprint("6", tensors=(A, ("b", "I8", (3,)))),
        fingerprint("7", tensors=(("a", "F32", (1, 2)), B)),
        fingerprint("8", tensors=(("a", "F32", (2, 1)), B)),
    ]
    assert len({same, *others}) == 7


def test_fingerprint_changes_when_a_file_is_replaced(tmp_path, opened):
    before = opened(str(write_checkpoint(tmp_path, [A]))).fingerprint()
    (tmp_path / "model.safetensors").unlink()
    assert opened(str(write_checkpoint(tmp_path, [A]))).fingerprint() != before


def test_columns_are_read_only_and_checked(tmp_path, opened):
    index = opened(str(write_checkpoint(tmp_path, [A, B, ("s", "F16", ()), ("e", "F4", (2, 0, 4))])))
    with pytest.raises(ValueError, match="read-only"):
        index.starts[0] = 1
    assert index.shape_of(index.position("s")) == ()
    assert index.shape_of(index.position("e")) == (2, 0, 4)
    assert index.extent_of(index.position("e")).num_bytes == 0
    values = index.__reduce__()[1][0]
    with pytest.raises(ValueError, match="4 names needs columns of that length"):
        type(index)(**(values | {"starts": index.starts[:-1]}))


def test_checkpoint_without_tensors(tmp_path, opened):
    index = opened(str(write_checkpoint(tmp_path, [])))
    assert len(index) == index.total_bytes == 0
    assert pickle.loads(pickle.dumps(index)).fingerprint() == index.fingerprint()
