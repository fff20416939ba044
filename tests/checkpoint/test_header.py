"""One header: hostile files, and agreement with safetensors' own reader."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ray_streamer.checkpoint.header import MAX_HEADER_BYTES, header_extent, parse_header
from ray_streamer.dtypes import DTYPES, dtype_named
from ray_streamer.errors import CheckpointError, HeaderError
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header

HOSTILE_FOLDER = Path(__file__).parent / "hostile"

# File name without suffix -> what the message must say. The files are tiny and readable.
HOSTILE = {
    "bits-wrap-to-zero": "F64 of shape [2305843009213693952] has 2**62 bits or more",
    "byte-order-mark": "not valid JSON: Unexpected UTF-8 BOM",
    "control-character": "not valid JSON: Invalid control character",
    "data-too-long": "1 byte follows the last tensor",
    "data-truncated": "1 byte is missing: the header describes a file of 63 bytes, it has 62",
    "data-without-tensors": "1 byte follows the last tensor",
    "deep-nesting": "not valid JSON: maximum recursion depth",
    "dtype-not-string": "dtype must be one of BOOL",
    "duplicate-field": "key 'dtype' appears 2 times",
    "duplicate-tensor": "key 'a' appears 2 times",
    "duplicate-tensor-escaped": "key 'a' appears 2 times",
    "empty-file": "the file has 0 bytes",
    "empty-tensor-inside-another": "tensor 'b': data begins at byte 1 of the data, expected 2",
    "encoded-surrogate": "not UTF-8",
    "entry-as-list": "tensor 'a': must be described by an object, got list",
    "entry-not-object": "tensor 'a': must be described by an object, got list",
    "gap-at-start": "tensor 'a': data begins at byte 1 of the data, expected 0",
    "gap-in-the-middle": "tensor 'b': data begins at byte 2 of the data, expected 1",
    "half-byte": "F4 of shape [3] is 12 bits, which do not fill whole bytes",
    "length-above-cap": "header length is 95.4 MiB (100000001 bytes), above the cap of 95.4 MiB (100000000 bytes)",
    "length-max-u64": "header length is 16384 PiB (18446744073709551615 bytes), above the cap",
    "length-past-end": "1 byte is missing inside the header",
    "list-at-top": "must be a JSON object, got list",
    "lone-surrogate": "half a surrogate pair",
    "many-digits-shape": "not valid JSON: Exceeds the limit",
    "metadata-is-tensor": "__metadata__ must map strings to strings",
    "metadata-not-object": "__metadata__ must be a JSON object",
    "metadata-number": "__metadata__ must map strings to strings, but 'a' is a int",
    "metadata-twice": "key '__metadata__' appears 2 times",
    "missing-field": "tensor 'a': has no data_offsets",
    "no-header": "not valid JSON: Expecting value",
    "not-json": "not valid JSON: Expecting value",
    "not-utf8": "not UTF-8: invalid start byte at byte 2",
    "offsets-huge": "data_offsets must be a pair of integers",
    "offsets-negative": "data_offsets must be a pair of integers",
    "offsets-not-pair": "data_offsets must be a pair of integers",
    "offsets-reversed": "U8 of shape [2] is 2 bytes, but data_offsets span -2",
    "overlap": "tensor 'b': data begins at byte 1 of the data, expected 2",
    "overlong-utf8": "not UTF-8",
    "same-bytes-twice": "tensor 'b': data begins at byte 0 of the data, expected 2",
    "seven-bytes": "the file has 7 bytes",
    "shape-above-u64": "shape must be a list of integers",
    "shape-bool": "shape must be a list of integers",
    "shape-float": "shape must be a list of integers",
    "shape-many-dimensions": "65 dimensions",
    "shape-minus-zero": "shape must be a list of integers",
    "shape-negative": "shape must be a list of integers",
    "shape-not-list": "shape must be a list of integers",
    "shape-overflow-before-zero": "[4611686018427387903, 8, 0] has 2**62 bits or more",
    "shape-string": "shape must be a list of integers",
    "shape-wraps-to-zero": "[4294967296, 4294967296] has 2**62 bits or more",
    "six-bits": "F6_E2M3 of shape [2] is 12 bits",
    "size-too-large": "U8 of shape [1] is 1 byte, but data_offsets span 2",
    "size-too-small": "F32 of shape [2] is 8 bytes, but data_offsets span 2",
    "trailing-comma": "not valid JSON",
    "trailing-garbage": "not valid JSON: Extra data",
    "trailing-nul": "not valid JSON: Extra data",
    "unclosed-json": "not valid JSON",
    "unknown-dtype": "tensor 'a': dtype must be one of BOOL, F4, F6_E2M3",
    "unknown-field-infinite": "unknown field 'x' must be a plain value",
    "unknown-field-nan": "NaN is not a JSON number",
    "unknown-field-nested": "unknown field 'x' must be a plain value",
}

# What we refuse on purpose and safetensors accepts.
STRICTER = re.compile(
    r"appears \d+ times|must be described by an object, got list|dtype must be one of .*, got \{|unknown field"
    r"|above the limit of 64|2\*\*62"
)


def parse(data: bytes):
    return parse_header(data, file="s3://b/a.safetensors", size_bytes=len(data))


def file_bytes(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def as_oracle_says(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Name -> (dtype, shape, bytes) by safetensors' own reader; None when it refuses."""
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in tensors}


def as_we_say(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    header = parse(data)
    return {
        name: (
            DTYPES[header.dtype_codes[row]].name,
            header.shapes[row, : header.num_dims[row]].tolist(),
            data[header.starts[row] : header.stops[row]],
        )
        for row, name in enumerate(header.names)
    }


def assert_agrees(data: bytes) -> None:
    expected = as_oracle_says(data)
    if expected is None:
        with pytest.raises(HeaderError):
            parse(data)
        return
    try:
        found = as_we_say(data)
    except HeaderError as error:
        if not STRICTER.search(str(error)):
            raise
        return
    assert found == expected


def test_every_hostile_file_has_an_expectation():
    assert sorted(path.stem for path in HOSTILE_FOLDER.iterdir()) == sorted(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_its_rule(name):
    data = (HOSTILE_FOLDER / f"{name}.bin").read_bytes()
    with pytest.raises(HeaderError, match=re.escape(HOSTILE[name])) as caught:
        parse(data)
    assert str(caught.value).startswith("s3://b/a.safetensors: ")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", HOSTILE)
def test_safetensors_refuses_the_hostile_file_or_we_are_stricter_on_purpose(name):
    assert_agrees((HOSTILE_FOLDER / f"{name}.bin").read_bytes())


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("{}", id="no-tensors"),
        pytest.param("{}      ", id="padded-with-spaces"),
        pytest.param(' \t\r\n{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}\n', id="whitespace-around"),
        pytest.param('{"__metadata__":{"format":"pt","a:b":"{c:d}"},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', id="colons"),
        pytest.param('{"__metadata__":null}', id="metadata-null"),
        pytest.param('{"\\ud83d\\ude00\\u0000":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', id="escaped-name"),
        pytest.param('{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', id="empty-name"),
        pytest.param('{"-0":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', id="minus-zero-in-name"),
        pytest.param('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"crc":-7.5,"ok":true}}', id="unknown-fields"),
        pytest.param('{"a":{"dtype":"U8","shape":[0,4294967296],"data_offsets":[0,0]}}', id="empty-and-wide"),
        pytest.param(
            '{"z":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},'
            '"m":{"dtype":"F64","shape":[0,3],"data_offsets":[0,0]}}',
            id="empties-at-both-ends",
        ),
    ],
)  # fmt: skip
def test_unusual_but_legal_header_reads_as_safetensors_reads_it(header):
    data = file_bytes(header)
    data = data if as_oracle_says(data) is not None else file_bytes(header, b"x")
    expected = as_oracle_says(data)
    assert expected is not None
    assert as_we_say(data) == expected


def test_tensor_data_need_not_be_aligned():
    data = file_bytes(
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[1],"data_offsets":[3,7]}}',
        bytes(7),
    )
    assert as_we_say(data) == as_oracle_says(data)


def test_header_at_the_cap_is_legal_and_one_byte_more_is_not():
    at_cap = struct.pack("<Q", MAX_HEADER_BYTES)
    assert header_extent(at_cap, file="a", size_bytes=MAX_HEADER_BYTES + 8).num_bytes == MAX_HEADER_BYTES
    with pytest.raises(HeaderError, match="above the cap"):
        header_extent(struct.pack("<Q", MAX_HEADER_BYTES + 1), file="a", size_bytes=MAX_HEADER_BYTES + 9)


def test_truncated_file_says_how_many_bytes_are_missing():
    data = serialize_header([TensorSpec("a", "F32", (1000,))])
    with pytest.raises(HeaderError, match=r"^a: 3.9 KiB \(3996 bytes\) are missing: .* it has .*truncated"):
        parse_header(data, file="a", size_bytes=len(data) + 4)


def test_names_in_messages_are_short_and_printable():
    name = "n\n" * 10_000
    data = file_bytes(json.dumps({name: {"dtype": "U8"}}))
    with pytest.raises(HeaderError) as caught:
        parse(data)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_head_that_ends_inside_the_header_is_the_callers_mistake():
    data = serialize_header([TensorSpec("a", "F32", (1,))]) + bytes(4)
    with pytest.raises(ValueError, match="head has 20 bytes"):
        parse_header(data[:20], file="a", size_bytes=len(data))


def test_columns_are_in_the_order_of_bytes_with_absolute_offsets():
    specs = [TensorSpec("small", "U8", (3,)), TensorSpec("wide", "F32", (2, 1, 4)), TensorSpec("scalar", "F32", ())]
    head = serialize_header(specs)
    header = parse_header(head, file="a", size_bytes=len(head) + 39)
    assert header.names == ("scalar", "wide", "small")
    assert header.num_dims.tolist() == [0, 3, 1]
    assert header.shapes.tolist() == [[1, 1, 1], [2, 1, 4], [3, 1, 1]]
    assert (header.starts - len(head)).tolist() == [0, 4, 36]
    assert (header.stops - len(head)).tolist() == [4, 36, 39]
    assert [column.dtype for column in (header.dtype_codes, header.num_dims, header.shapes, header.starts)] == [
        np.uint8,
        np.uint8,
        np.int64,
        np.int64,
    ]


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (8,), (4, 16), (3, 0, 8), (2, 3, 8)], ids=str)
def test_every_dtype_reads_as_safe_open_reads_it(tmp_path, dtype, shape):
    num_bits = int(np.prod(shape)) * dtype_named(dtype).num_bits
    if num_bits % 8:
        pytest.skip("not whole bytes: safetensors cannot write it")
    spec = TensorSpec("t", dtype, shape)
    data = serialize_header([spec, TensorSpec("other", "U8", (3,))]) + bytes(num_bits // 8 + 3)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    header = parse(data)
    row = header.names.index("t")
    with safetensors.safe_open(path, framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(header.names)
        view = opened.get_slice("t")
        assert view.get_dtype() == DTYPES[header.dtype_codes[row]].name == dtype
        assert tuple(view.get_shape()) == tuple(header.shapes[row, : header.num_dims[row]]) == shape
        if not dtype.startswith("F6"):
            tensor = opened.get_tensor("t")
            assert tuple(tensor.shape) == dtype_named(dtype).torch_shape(shape)
            assert tensor.dtype is getattr(torch, dtype_named(dtype).torch_name)
    assert as_we_say(data) == as_oracle_says(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_parse_or_raise_checkpoint_error(data):
    with contextlib.suppress(CheckpointError):
        parse(data)


@given(st.binary(max_size=120), st.binary(max_size=20))
def test_arbitrary_header_text_agrees_with_safetensors(text, data):
    assert_agrees(file_bytes(text, data))


VALID = file_bytes(
    '{"__metadata__":{"k":"v"},"ab":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    '"c":{"dtype":"U8","shape":[],"data_offsets":[8,9]},"-0":{"dtype":"F4","shape":[4],"data_offsets":[9,11]}}',
    bytes(range(11)),
)
FRAGMENTS = [b"", b"\0", b'"', b"\\", b"\\u", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"-", b"-0", b"0", b"00"]
FRAGMENTS += [b"1", b".0", b"e1", b"e999", b" ", b"\t", b"\x0c", b"\xc2\xa0", b"\xff", b"null", b"true", b"NaN"]
FRAGMENTS += [b'"c":1,', b'"dtype":"U8",', b'"x":"y",', b'"x":{},', b"18446744073709551615", b"18446744073709551616"]


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """The valid file with a few fragments put in or over its JSON, and its length made right again, mostly."""
    text = VALID[8:-11]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 4)))
        text = text[:start] + draw(st.sampled_from(FRAGMENTS)) + text[stop:]
    return file_bytes(text, VALID[-11:])


@given(mutated_headers())
@example(VALID)
def test_mutated_headers_agree_with_safetensors(data):
    assert_agrees(data)


ODD_COUNTS = st.one_of(st.integers(0, 12), st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 1.0]))
COUNTS = st.one_of(st.integers(0, 6), ODD_COUNTS, st.none(), st.booleans(), st.text(max_size=2))
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([dtype.name for dtype in DTYPES] + ["f32", "", 1, None, {"U8": None}]),
            "shape": st.lists(st.one_of(st.integers(0, 6), ODD_COUNTS), max_size=4),
            "data_offsets": st.lists(st.one_of(st.integers(0, 12), ODD_COUNTS), min_size=1, max_size=3),
        },
        optional={"extra": st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.lists(COUNTS))},
    ),
    st.tuples(st.sampled_from(["U8", "F32"]), st.just([1]), st.just([0, 1])),
    COUNTS,
)


@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=4), st.integers(0, 16))
def test_odd_values_agree_with_safetensors(entries, num_data_bytes):
    assert_agrees(file_bytes(json.dumps(entries), bytes(num_data_bytes)))


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """Legal files, entries in any order, with at most one number of the layout changed."""
    entries, stop = [], 0
    for number in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=4))
        start, stop = stop, stop + int(np.prod(shape)) * dtype.num_bits // 8
        entries.append((f"t{number}", {"dtype": dtype.name, "shape": shape, "data_offsets": [start, stop]}))
    if entries and draw(st.booleans()):
        _, broken = draw(st.sampled_from(entries))
        side = draw(st.integers(0, 1))
        broken["data_offsets"][side] += draw(st.integers(-3, 3))
    num_data_bytes = max(0, stop + draw(st.sampled_from([0, 0, 0, -1, 1])))
    return file_bytes(json.dumps(dict(draw(st.permutations(entries)))), bytes(num_data_bytes))


@given(tensor_files())
def test_layouts_agree_with_safetensors(data):
    assert_agrees(data)
