"""Calls reach a C library as C sees them: addresses, sizes and handles of 64 bits, and an error's own words.

The library is compiled here and has the runtime's functions with the runtime's arguments; it copies at once.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ray_streamer.device.base import Copy
from ray_streamer.device.cuda import CudaDevice
from ray_streamer.device.cuda_library import SIGNATURES, LoadedLibrary
from ray_streamer.device.cuda_runtime import CudaRuntime
from ray_streamer.dtypes import dtype_named
from ray_streamer.errors import DeviceError
from ray_streamer.planning.rank_plan import Piece

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
#include <stddef.h>
#include <string.h>
static char *const HANDLE = (char *)0x7eadbeef12345678;
static int num_locked;
int P(SetDevice)(int device) { return device == 3 ? 0 : 101; }
int P(StreamCreateWithFlags)(void **stream, unsigned flags) { *stream = HANDLE; return flags != 1; }
int P(StreamSynchronize)(void *stream) { return stream != HANDLE; }
int P(StreamWaitEvent)(void *stream, void *event, unsigned flags) { return stream != HANDLE || event != HANDLE + 1; }
int P(EventCreateWithFlags)(void **event, unsigned flags) { *event = HANDLE + 1; return !(flags & 2); }
int P(EventRecord)(void *event, void *stream) { return event != HANDLE + 1 || (stream != HANDLE && stream); }
int P(EventSynchronize)(void *event) { return event != HANDLE + 1; }
int P(HostRegister)(void *memory, size_t bytes, unsigned flags) { ++num_locked; return bytes != 20000 || flags != 1; }
int P(HostUnregister)(void *memory) { return num_locked-- ? 0 : 713; }
int P(MemcpyAsync)(void *to, const void *from, size_t bytes, int kind, void *stream) {
    if (kind != 1 || stream != HANDLE) return 1;
    memcpy(to, from, bytes);
    return 0;
}
int P(Memcpy2DAsync)(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                     int kind, void *stream) {
    if (kind != 1 || stream != HANDLE) return 12;
    for (size_t row = 0; row < height; ++row)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return 0;
}
int P(GetLastError)(void) { return 0; }
const char *P(GetErrorString)(int status) { return status == 101 ? "invalid device ordinal" : "something else"; }
"""


class Library(LoadedLibrary):
    """The compiled library; torch has no stream here to ask for."""

    def caller_stream(self, device: torch.device) -> int:
        return 0

    def guard(self, device: torch.device) -> nullcontext[None]:
        return nullcontext()


@pytest.fixture(scope="module", params=["cuda", "hip"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("library")
    (folder / "runtime.c").write_text(f"#define P(name) {request.param}##name\n{SOURCE}")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "runtime.so"), str(folder / "runtime.c")]
    subprocess.run(command, check=True, capture_output=True)
    return Library(str(folder / "runtime.so"), request.param)


def test_a_device_on_a_compiled_runtime(library: Library) -> None:
    device = CudaDevice(CudaRuntime(library, torch.device("cpu"), 3))
    arena = np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8)
    tensor = device.empty(dtype_named("U8"), (3 * 2048 + 5000,))
    device.wait_for_caller_stream()
    device.pin(memoryview(arena))
    errors: list[BaseException | None] = []
    rows = Piece(0, 100, 2048, 3, 4096, 0, 2048)
    rest = Piece(0, 15000, 5000, 1, 5000, 3 * 2048, 5000)
    device.deliver(arena, [Copy(piece, device.result(tensor)) for piece in (rows, rest)], errors.append)
    device.close()
    assert errors == [None]
    expected = [arena[100 + 4096 * row : 100 + 4096 * row + 2048] for row in range(3)] + [arena[15000:]]
    assert np.array_equal(tensor.numpy(), np.concatenate(expected))


def test_its_own_words_are_in_the_error(library: Library) -> None:
    with pytest.raises(DeviceError, match=f"^{library.prefix}SetDevice on cuda:4 failed: invalid device ordinal"):
        CudaRuntime(library, torch.device("cpu"), 4).start()


def test_a_library_that_lacks_a_function_cannot_be_taken() -> None:
    with pytest.raises(AttributeError, match=f"cuda{next(iter(SIGNATURES))}"):
        LoadedLibrary("libc.so.6", "cuda")
