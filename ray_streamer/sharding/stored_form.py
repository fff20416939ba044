"""What do the dimensions of a quantized weight's tensors count? Told by their dtypes and shapes.

How many elements share a scale follows from the shapes; where a shorter last block leaves that open, the sizes that
config.json's `quantization_config` names decide. A form that does not follow is no error here: it is one that cannot be
cut, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ray_streamer.sharding.companion import Companion, StoredDim, Uncut

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ray_streamer.sharding.placement import Placement

WHOLE = ""
"""The part of a weight that bears its name."""

HOLDERS: frozenset[str] = frozenset({WHOLE, "packed", "blocks", "qweight"})
"""Parts that hold a weight's elements; one of them is stored."""

_OF_INPUTS = ("input_scale", "pre_quant_scale")
"""Parts that may have a number for each input; of stacked experts one for each expert."""

_WORD_BITS = 32
_BYTE_WIDE = {"U8", "F8_E4M3", "F8_E8M0"}
_BLOCK_KEYS = ("weight_block_size", "block_structure", "group_size", "q_group_size")
_BIT_KEYS = ("bits", "num_bits", "w_bit")
_OF_OTHERS = ("input_activations", "output_activations", "kv_cache_scheme")
"""Keys of a quantization config under which numbers are not about weights."""

_BITS = range(2, 9)
"""Of an element of GPTQ and AWQ."""
_LARGEST_HINT = 1 << 20

_BITNET = (
    "BitNet packs rows from all over a weight into one byte: let every rank hold it whole, for example "
    'rules={"*_proj.weight": Replicate()}'
)
_BITSANDBYTES = (
    "bitsandbytes stores a 4-bit weight flat and without its shape, so no rank's part can be told: let every rank hold it "
    'whole, for example rules={"*_proj.weight": Replicate()}'
)
_ACTIVATION_ORDER = (
    "quantized in activation order (desc_act), so an input of any rank may need any group: let every rank hold all groups of the layers "
    'named here, and of no others: Replicate() for their scales and zero points, as in rules={"*.o_proj.scales": Replicate(), '
    '"*.o_proj.qzeros": Replicate()}'
)


class StoredPart(NamedTuple):
    """One stored tensor of a weight: dtype and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How one stored tensor counts the weight that it belongs to.

    Attributes:
        weight_shape: Logical elements of the weight.
        dims: What the tensor's dimensions count; None when no rank can hold a part.
        reason: Without `dims`: why.
    """

    weight_shape: tuple[int, ...]
    dims: tuple[StoredDim, ...] | None
    reason: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is the weight, element by element."""
        return self.dims == tuple(map(StoredDim, range(len(self.weight_shape))))

    def placed_with(self, weight: Placement) -> Placement:
        """Where the tensor lies when its weight lies as `weight` says."""
        return Uncut(weight, self.reason) if self.dims is None else Companion(weight, self.weight_shape, self.dims)


@dataclass(frozen=True, slots=True)
class QuantizationHints:
    """What config.json says of the quantization.

    Attributes:
        block_sizes: Elements that share a scale, wherever the config names such a number.
        bits: Bits of an element, likewise.
        is_in_order: Whether groups are runs of neighbouring inputs; unknown is no.
        is_bitnet: Whether bytes of weights are packed as BitNet does.
    """

    block_sizes: frozenset[int] = frozenset()
    bits: frozenset[int] = frozenset()
    is_in_order: bool = False
    is_bitnet: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Self:
        """From a parsed config.json."""
        found = (config or {}).get("quantization_config") or (config or {}).get("compression_config")
        if not isinstance(found, dict):
            return cls()
        block_sizes, bits = frozenset(_numbers(found, _BLOCK_KEYS)), frozenset(_numbers(found, _BIT_KEYS))
        return cls(block_sizes, bits, not found.get("desc_act", False), found.get("quant_method") == "bitnet")


def forms_of(parts: Mapping[str, StoredPart], hints: QuantizationHints) -> dict[str, StoredForm]:
    """The form of every stored part of one weight.

    >>> parts = {"": StoredPart("F8_E4M3", (576, 512)), "scale_inv": StoredPart("F32", (5, 4))}
    >>> forms_of(parts, QuantizationHints(block_sizes=frozenset({128})))["scale_inv"].dims
    (StoredDim(weight_dim=0, elements=128, steps=1, uncut=''), StoredDim(weight_dim=1, elements=128, steps=1, uncut=''))

    Args:
        parts: Part's name -> dtype and shape; one of `HOLDERS` is among them.
        hints: What config.json says.
    """
    if "absmax" in parts:
        return dict.fromkeys(parts, StoredForm((), None, _BITSANDBYTES))
    holder, find = next((part, find) for part, find in _FINDERS.items() if part in parts)
    if unusual := _unusual_shape(holder, parts):
        return dict.fromkeys(parts, StoredForm((), None, unusual))
    held = find(parts, hints)
    if held.dims is None:
        return dict.fromkeys(parts, held)
    dims_of = _dims_beside_blocks if holder == "blocks" else _dims_of
    forms = {holder: held}
    for part in parts.keys() - forms.keys():
        dims = dims_of(part, parts, held.weight_shape, hints)
        reason = (
            ""
            if dims is not None
            else f"its shape does not tell which part of a weight {list(held.weight_shape)} it belongs to"
        )
        forms[part] = StoredForm(held.weight_shape, dims, reason)
    return forms


def _unusual_shape(holder: str, parts: Mapping[str, StoredPart]) -> str | None:
    """Why the holder of a weight does not have a shape of its kind; None when it does."""
    shape = parts[holder].shape
    if holder == WHOLE or (all(shape) and len(shape) == _NUM_DIMS.get(holder, max(1, len(shape)))):
        return None
    return f"the shape {list(shape)} is none of a weight that is stored as {holder}"


def _plain_or_packed(parts: Mapping[str, StoredPart], hints: QuantizationHints) -> StoredForm:
    """Two elements of 4 bits in a byte are told by their scales, which are narrow and of two dimensions."""
    dtype, shape = parts[WHOLE]
    if dtype == "U8" and hints.is_bitnet:
        return StoredForm((), None, _BITNET)
    scale = parts.get("scale")
    if dtype == "U8" and scale is not None and scale.dtype in _BYTE_WIDE and len(scale.shape) == len(shape) >= 2:
        return _packed_last(shape, 8, 4)
    return StoredForm(shape, tuple(map(StoredDim, range(len(shape)))))


def _words(parts: Mapping[str, StoredPart], hints: QuantizationHints) -> StoredForm:
    """compressed-tensors: words along the last dimension; how wide an element is, scales and config say together."""
    dtype, shape = parts["packed"]
    if dtype == "U8":
        return _packed_last(shape, 8, 4)
    # Of 3 or 5 bits a word has bits left, and the last one elements: the shape does not tell the weight's.
    forms = [_packed_last(shape, _WORD_BITS, bits) for bits in sorted(hints.bits) if bits in (1, 2, 4, 8, 16)]
    if "scale" in parts:
        forms = [form for form in forms if _counted(parts["scale"].shape, form.weight_shape, hints) is not None]
    if len(forms) == 1:
        return forms[0]
    return StoredForm(
        (), None, "config.json does not say how many bits one of its elements has, or they do not fill a word"
    )


def _packed_last(shape: tuple[int, ...], word_bits: int, bits: int) -> StoredForm:
    weight_shape = (*shape[:-1], shape[-1] * word_bits // bits)
    last = len(shape) - 1
    return StoredForm(weight_shape, (*map(StoredDim, range(last)), _packed_dim(last, word_bits, bits)))


def _packed_dim(dim: int, word_bits: int, bits: int) -> StoredDim:
    """Whole words only: 8 elements of 4 bits to a word of 32, 32 elements of 3 bits to three."""
    return StoredDim(dim, word_bits // bits) if word_bits % bits == 0 else StoredDim(dim, word_bits, bits)


def _rows_or_columns(parts: Mapping[str, StoredPart], hints: QuantizationHints) -> StoredForm:
    """GPTQ packs inputs, AWQ outputs; the columns of the scales, one for each output, tell which. Both are transposed."""
    (rows, columns), scales, zeros = parts["qweight"].shape, parts.get("scales"), parts.get("qzeros")
    if scales is None or len(scales.shape) != 2 or not all(scales.shape):
        return StoredForm((), None, "qweight has no scales of two dimensions beside it")
    outputs = scales.shape[1]
    if columns != outputs:
        bits = _WORD_BITS * columns // outputs
    else:
        bits = _WORD_BITS * zeros.shape[-1] // outputs if zeros and zeros.shape else min(hints.bits, default=0)
        if not bits:
            return StoredForm((), None, "neither qzeros nor config.json say how many bits an element of qweight has")
    # BitBLAS and FP-Quant pack bytes, and AWQ for GEMV does not transpose: columns of their scales are groups.
    if parts["qweight"].dtype != "I32" or bits not in _BITS:
        told = f"qweight is {parts['qweight'].dtype} {[rows, columns]} and scales are {list(scales.shape)}"
        return StoredForm((), None, f"{told}: not as GPTQ or AWQ (GEMM) packs a weight")
    if columns != outputs:
        return StoredForm((outputs, rows), (StoredDim(1), _packed_dim(0, _WORD_BITS, bits)))
    return StoredForm((outputs, rows * _WORD_BITS // bits), (_packed_dim(1, _WORD_BITS, bits), StoredDim(0)))


def _blocks(parts: Mapping[str, StoredPart], hints: QuantizationHints) -> StoredForm:
    """MXFP4 of gpt-oss: [experts, outputs, groups of inputs, bytes of a group], where bfloat16 is [experts, inputs, outputs]."""
    experts, outputs, groups, group_bytes = parts["blocks"].shape
    dims = (StoredDim(0), StoredDim(2), StoredDim(1, 2 * group_bytes), StoredDim(None))
    return StoredForm((experts, groups * 2 * group_bytes, outputs), dims)


def _dims_beside_blocks(
    part: str, parts: Mapping[str, StoredPart], weight_shape: tuple[int, ...], hints: QuantizationHints
) -> tuple[StoredDim, ...] | None:
    if parts[part].shape != parts["blocks"].shape[:3]:
        return None
    return StoredDim(0), StoredDim(2), StoredDim(1, 2 * parts["blocks"].shape[3])


def _dims_of(
    part: str, parts: Mapping[str, StoredPart], weight_shape: tuple[int, ...], hints: QuantizationHints
) -> tuple[StoredDim, ...] | None:
    dtype, shape = parts[part]
    if part in ("shape", "weight_format"):
        return (StoredDim(None),) * len(shape)
    if all(size == 1 for size in shape):
        return _counted(shape, weight_shape, hints) or (StoredDim(None),) * len(shape)
    if part == "g_idx" or (part in _OF_INPUTS and len(shape) == 1 and len(weight_shape) == 2):
        return (StoredDim(1),) if shape == weight_shape[1:] else None
    if part in ("qzeros", "scales") and len(shape) == 2:
        groups = _counted(shape[:1], weight_shape[1:], hints, first_dim=1)
        outputs = StoredDim(0) if part == "scales" else _packed_outputs(shape[1], weight_shape)
        return (_grouped(groups[0], is_in_order=hints.is_in_order), outputs) if groups and outputs else None
    if part == "zero_point" and dtype == "I32" and shape:
        groups, outputs = (
            _counted(shape[1:], weight_shape[1:], hints, first_dim=1),
            _packed_outputs(shape[0], weight_shape),
        )
        dims = (outputs, *groups) if groups and outputs else None
    else:
        dims = _counted(shape, weight_shape, hints)
    if dims and "packed" in parts and len(dims) > 1:
        return *dims[:-1], _grouped(dims[-1], is_in_order="g_idx" not in parts)
    return dims


def _packed_outputs(num_words: int, weight_shape: tuple[int, ...]) -> StoredDim | None:
    """The outputs of a weight, packed in words; None when there are too few words for them."""
    bits = _WORD_BITS * num_words // weight_shape[0] if weight_shape and weight_shape[0] else 0
    return _packed_dim(0, _WORD_BITS, bits) if bits else None


def _grouped(dim: StoredDim, *, is_in_order: bool) -> StoredDim:
    if is_in_order or dim.weight_dim is None:
        return dim
    return StoredDim(dim.weight_dim, dim.elements, dim.steps, _ACTIVATION_ORDER)


def _counted(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], hints: QuantizationHints, *, first_dim: int = 0
) -> tuple[StoredDim, ...] | None:
    """Each dimension beside the weight's, from the first on: as many indices, one for all, or one for each block."""
    if len(shape) > len(weight_shape):
        return None
    dims: list[StoredDim] = []
    for dim, (size, whole) in enumerate(zip(shape, weight_shape, strict=False), start=first_dim):
        elements = _block_elements(size, whole, hints)
        if elements is None:
            return None
        # One index for all may be one block, which the weight does not fill.
        block = max((block for block in hints.block_sizes if block >= whole), default=1) if len(shape) > 1 else 1
        dims.append(StoredDim(None, block) if size == 1 else StoredDim(dim, elements))
    # Fewer dimensions than the weight has may be anything, such as one scale for each part of a fused weight.
    is_partial = len(shape) < len(weight_shape) and any(dim.elements > 1 for dim in dims if dim.weight_dim is not None)
    return None if is_partial else tuple(dims)


def _block_elements(size: int, whole: int, hints: QuantizationHints) -> int | None:
    if size in (1, whole):
        return 1
    named = [block for block in hints.block_sizes if block > 0 and -(-whole // block) == size]
    if len(named) == 1:
        return named[0]
    block, rest = divmod(whole, size) if size else (0, 1)
    is_power_of_two = block & (block - 1) == 0
    return block if not named and not rest and is_power_of_two else None


def _numbers(value: Any, keys: Sequence[str]) -> Iterator[int]:
    """Every whole number from 1 on that says of weights what `keys` name, however deep, and that a block or word may have."""
    unseen = [value]
    while unseen:
        found = unseen.pop()
        if isinstance(found, list):
            unseen.extend(found)
        elif isinstance(found, dict):
            unseen.extend(inner for key, inner in found.items() if key not in _OF_OTHERS)
            for inner in (found[key] for key in keys if key in found):
                numbers = inner if isinstance(inner, list) else [inner]
                yield from (number for number in numbers if type(number) is int and 1 <= number <= _LARGEST_HINT)


_FINDERS = {WHOLE: _plain_or_packed, "packed": _words, "blocks": _blocks, "qweight": _rows_or_columns}
_NUM_DIMS = {"blocks": 4, "qweight": 2}
