"""How wide is each safetensors dtype, and which torch dtype holds it?

Source: safetensors 0.8.0, `Dtype` and its torch bindings. Shapes in a header count logical elements; two dtypes are narrower
than a byte. F4 is held by torch's packed `float4_e2m1fn_x2`, whose last dimension is half as long. The two F6 dtypes have no
torch dtype; they are delivered as `uint8`, last dimension in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One safetensors dtype.

    Attributes:
        name: As written in a header.
        num_bits: Bits of one logical element.
        torch_name: Attribute of the `torch` module that holds it.
        torch_bits: Bits of one torch element; differs from `num_bits` for packed dtypes only.
    """

    name: str
    num_bits: int
    torch_name: str
    torch_bits: int

    @property
    def is_packed(self) -> bool:
        """Whether several logical elements share a torch element in the last dimension."""
        return self.num_bits != self.torch_bits

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the torch tensor that holds `shape` logical elements.

        >>> dtype_named("F4").torch_shape((4, 64))
        (4, 32)
        """
        if not self.is_packed or not shape:
            return shape
        return (*shape[:-1], shape[-1] * self.num_bits // self.torch_bits)


def _dtype(name: str, num_bits: int, torch_name: str, torch_bits: int | None = None) -> DType:
    return DType(name=name, num_bits=num_bits, torch_name=torch_name, torch_bits=torch_bits or num_bits)


DTYPES: tuple[DType, ...] = (
    _dtype("BOOL", 8, "bool"),
    _dtype("F4", 4, "float4_e2m1fn_x2", 8),
    _dtype("F6_E2M3", 6, "uint8", 8),
    _dtype("F6_E3M2", 6, "uint8", 8),
    _dtype("U8", 8, "uint8"),
    _dtype("I8", 8, "int8"),
    _dtype("F8_E5M2", 8, "float8_e5m2"),
    _dtype("F8_E4M3", 8, "float8_e4m3fn"),
    _dtype("F8_E8M0", 8, "float8_e8m0fnu"),
    _dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    _dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    _dtype("I16", 16, "int16"),
    _dtype("U16", 16, "uint16"),
    _dtype("F16", 16, "float16"),
    _dtype("BF16", 16, "bfloat16"),
    _dtype("I32", 32, "int32"),
    _dtype("U32", 32, "uint32"),
    _dtype("F32", 32, "float32"),
    _dtype("C64", 64, "complex64"),
    _dtype("F64", 64, "float64"),
    _dtype("I64", 64, "int64"),
    _dtype("U64", 64, "uint64"),
)
"""Every dtype, in safetensors' own order; the position of one in this tuple is its code in columnar data."""

DTYPE_CODES: dict[str, int] = {dtype.name: code for code, dtype in enumerate(DTYPES)}


def dtype_named(name: str) -> DType:
    """The dtype that a header calls `name`.

    Raises:
        KeyError: safetensors has no such dtype.
    """
    return DTYPES[DTYPE_CODES[name]]
