"""What rank processes load of an adapter, on order: is its part of B @ A the part of the weight that a base model's rank holds?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray_streamer

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."


def load(
    adapter: str, deltas: str, *, is_transposed: bool, **arguments: Any
) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Loads both; for each weight whether the factors make this rank's part of it, and the shape of that part.

    Args:
        adapter: The adapter's uri.
        deltas: Of a checkpoint with the base model's names, whose weights are the whole products.
        is_transposed: Whether weights have their inputs first.
        arguments: Of `load_rank`, but for the uri.
    """
    factors = ray_streamer.load_rank(adapter, **arguments)
    held = ray_streamer.load_rank(deltas, **arguments)
    return {
        name: (_product(factors, name, is_transposed).equal(part), tuple(part.shape)) for name, part in held.items()
    }


def _product(factors: dict[str, torch.Tensor], name: str, is_transposed: bool) -> torch.Tensor:
    module = PREFIX + name.removesuffix(".weight")
    if f"{PREFIX}{name}" in factors:
        return factors[f"{PREFIX}{name}"]
    if f"{module}.lora_magnitude_vector" in factors:
        return factors[f"{module}.lora_magnitude_vector"]
    if f"{module}.lora_embedding_A" in factors:
        return (factors[f"{module}.lora_embedding_B"] @ factors[f"{module}.lora_embedding_A"]).T.contiguous()
    product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    return product.T.contiguous() if is_transposed else product


def refusal(uri: str, **arguments: Any) -> str:
    """The error of a load."""
    try:
        ray_streamer.load_rank(uri, **arguments)
    except ray_streamer.RayStreamerError as error:
        cause = error.cause if isinstance(error, ray_streamer.RankFailedError) else error
        return f"{type(cause).__name__}: {cause}"
    return "loaded"
