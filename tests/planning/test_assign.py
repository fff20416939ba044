"""Who reads what several want: somebody who wants it, and nobody much more than the others."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.planning.assign import assign_readers


@given(num_blocks=st.integers(0, 200), num_ranks=st.integers(1, 8))
def test_equal_blocks_that_everybody_wants_are_read_evenly(num_blocks, num_ranks):
    sizes = np.full(num_blocks, 4096, dtype=np.int64)
    readers = assign_readers(np.ones((num_blocks, num_ranks), dtype=bool), sizes)
    loads = np.bincount(readers, weights=sizes, minlength=num_ranks)
    assert loads.max() - loads.min() <= 4096


@given(data=st.data(), num_blocks=st.integers(1, 60), num_ranks=st.integers(1, 6))
def test_readers_want_their_blocks_and_no_taker_of_the_last_shared_circle_is_overloaded(data, num_blocks, num_ranks):
    rows = st.lists(st.booleans(), min_size=num_ranks, max_size=num_ranks).filter(any)
    wants = np.array(data.draw(st.lists(rows, min_size=num_blocks, max_size=num_blocks)))
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=num_blocks, max_size=num_blocks)), dtype=np.int64)
    readers = assign_readers(wants, sizes)
    assert wants[np.arange(num_blocks), readers].all()
    # Blocks that everybody wants come last, so a rank that reads one of them was no fuller than the emptiest before it.
    common = wants.all(axis=1)
    loads = np.bincount(readers, weights=sizes, minlength=num_ranks)
    for rank in set(readers[common].tolist()) if num_ranks > 1 else ():
        assert loads[rank] - sizes[common].max() <= loads.min()
