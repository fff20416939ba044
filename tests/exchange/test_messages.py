"""Messages come out as they went in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import ClusterError
from ray_streamer.exchange.messages import (
    MAX_MESSAGE_BYTES,
    MAX_NUMBERS,
    MAX_REASON_CHARACTERS,
    Failure,
    Hello,
    Kind,
    decode_failure,
    decode_hello,
    decode_numbers,
    encode_failure,
    encode_hello,
    encode_numbers,
)

SMALLEST_SOCKET_BUFFER = 4608
"""What Linux makes of SO_SNDBUF=1."""


@given(
    st.builds(
        Hello,
        local_rank=st.integers(0, 1 << 15),
        plan_hash=st.text(),
        num_slots=st.integers(0, 1 << 31),
        slot_bytes=st.integers(0, 1 << 31),
    )
)
def test_hello(hello):
    message = encode_hello(hello)
    assert message[0] == Kind.HELLO
    assert decode_hello(message[1:]) == hello


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"{}", b'{"local_rank": 1}', b"\xff", b"null"])
def test_a_greeting_of_another_version(payload):
    with pytest.raises(ClusterError, match="this version cannot read"):
        decode_hello(payload)


@given(st.builds(Failure, rank=st.integers(-1, 1 << 20), node=st.text(max_size=100), reason=st.text(max_size=500)))
def test_failure(failure):
    message = encode_failure(failure)
    assert message[0] == Kind.FAILED
    assert decode_failure(message[1:]) == failure


@pytest.mark.parametrize("character", ["a", "\N{OLD PERSIAN SIGN A}", "\0"])
def test_long_reasons_are_cut_and_fit_into_a_message(character):
    message = encode_failure(Failure(rank=1, node="n", reason=character * 100_000))
    assert len(message) <= MAX_MESSAGE_BYTES
    assert decode_failure(message[1:]).reason == character * MAX_REASON_CHARACTERS


@given(
    st.sampled_from([Kind.ANNOUNCE, Kind.RELEASE, Kind.VIEWED]),
    st.lists(st.integers(0, (1 << 32) - 1), max_size=MAX_NUMBERS),
)
def test_numbers(kind, numbers):
    message = encode_numbers(kind, numbers)
    assert message[0] == kind
    assert decode_numbers(message[1:]) == numbers


def test_a_full_message_fits_into_the_smallest_socket_buffer():
    assert MAX_NUMBERS % 2 == 0
    assert len(encode_numbers(Kind.ANNOUNCE, [0] * MAX_NUMBERS)) < SMALLEST_SOCKET_BUFFER - 64
