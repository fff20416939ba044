"""Is this file in the page cache already?

Asked by reading one byte at about 64 places with RWF_NOWAIT, which says no rather than wait for a disk. `mincore`
cannot be asked: since Linux 5.2 it calls every page of a file resident that one may not write.

The question is not free of side effects: a refused read starts the disk on that one page, which is there when the next
process asks. So places are random, and counting stops as soon as the answer is certain.
"""

from __future__ import annotations

import os
import random

PAGE_BYTES = 4096
_NUM_SAMPLES = 64
_ALLOWED_MISSES = _NUM_SAMPLES // 10


def is_page_cached(descriptor: int, size_bytes: int) -> bool:
    """Whether at least nine tenths of an open file seem to be in memory; False where the file system does not say."""
    num_pages = -(-size_bytes // PAGE_BYTES)
    num_samples = min(_NUM_SAMPLES, num_pages)
    allowed_misses = _ALLOWED_MISSES * num_samples // _NUM_SAMPLES
    byte = bytearray(1)
    num_misses = 0
    for sample in range(num_samples):
        page = random.randrange(sample * num_pages // num_samples, (sample + 1) * num_pages // num_samples)
        try:
            os.preadv(descriptor, [byte], page * PAGE_BYTES, os.RWF_NOWAIT)
        except BlockingIOError:
            num_misses += 1
        except OSError:
            return False
        if num_misses > allowed_misses:
            return False
    return True
