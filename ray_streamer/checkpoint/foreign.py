"""What is a file that is no safetensors file? Told by its first bytes, with what to do about it."""

from __future__ import annotations

_CONVERT = "convert the model to safetensors first, or fetch the revision of it that has safetensors files"
_FETCH = "fetch it again, and look at what the server said"

_MAGIC = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"GGUF", f"is a GGUF file of llama.cpp: {_CONVERT}"),
    (b"ggml", f"is a GGML file of llama.cpp: {_CONVERT}"),
    (b"PK\x03\x04", f"is a zip archive, as torch.save writes: {_CONVERT}"),
    (b"\x80\x02", f"is a pickle, as torch.save writes: {_CONVERT}"),
    (b"\x80\x03", f"is a pickle: {_CONVERT}"),
    (b"\x80\x04", f"is a pickle: {_CONVERT}"),
    (b"\x80\x05", f"is a pickle: {_CONVERT}"),
    (b"\x89HDF", f"is an HDF5 file: {_CONVERT}"),
    (b"\x93NUMPY", f"is a numpy file: {_CONVERT}"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it first"),
    (b"<!doctype", f"is an HTML page, not the file that was asked for: {_FETCH}"),
    (b"<html", f"is an HTML page, not the file that was asked for: {_FETCH}"),
    (b"<?xml", f"is an XML answer, not the file that was asked for: {_FETCH}"),
    (b"<error", f"is an XML answer, not the file that was asked for: {_FETCH}"),
    (bytes(8), "begins with zeros: a download or copy of it was begun and not finished; fetch it again"),
)


def foreign_format(head: bytes) -> str | None:
    r"""What a file is that begins with `head`, completing a sentence about it; None when that cannot be told.

    Ask only about a file that is no safetensors file: a header's length may look like anything.

    >>> foreign_format(b"GGUF\x03\x00\x00\x00")[:21]
    'is a GGUF file of lla'
    """
    start = head[:64].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n") if head[:1] in b" \t\r\n\xef<" else head[:64]
    lower = start.lower()
    for magic, said in _MAGIC:
        if start.startswith(magic) or (magic.startswith(b"<") and lower.startswith(magic)):
            return said
    return None
