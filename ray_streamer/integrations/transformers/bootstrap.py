"""How does `load_sharded(bootstrap="transformers")` know what to start on each rank? A driver gives this; the ranks do as it says.

Nothing here imports Ray, torch or transformers: a driver may lack a GPU, and need not wait for imports before it knows what it asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError
from ray_streamer.integrations.transformers.support import refuse_arguments, refuse_quantized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.cluster.model import ShardedModel
    from ray_streamer.integrations.transformers.model_class import ModelClass
    from ray_streamer.slices import RankSlices


@dataclass(frozen=True, slots=True)
class TransformersBootstrap:
    """Each rank holds its part of a model of transformers, ready to run.

    Attributes:
        model_class: A class such as LlamaForCausalLM, an Auto class, or "auto" for the class that config.json names.
        model_arguments: Further arguments of transformers' `from_pretrained`, such as {"attn_implementation": "sdpa"}.

    Raises:
        SettingsError: An argument cannot be given.
    """

    model_class: ModelClass = "auto"
    model_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_arguments(self.model_arguments)

    def slices(self, dtype: Any) -> ModelSlices:
        """What the ranks are asked for.

        Args:
            dtype: Of the parameters; None = as config.json says.

        Raises:
            SettingsError: transformers takes no such dtype.
        """
        if isinstance(dtype, dict):
            raise SettingsError(
                f"bootstrap: transformers has one dtype for a model, not one for each glob; got {dtype!r}"
            )
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        return ModelSlices(self.model_class, name, self.model_arguments)

    def handle(self) -> type[ShardedModel]:
        """The class of what the caller holds; imports Ray."""
        from ray_streamer.integrations.transformers.model_group import TransformersModel

        return TransformersModel


BOOTSTRAP = TransformersBootstrap()
"""What "transformers" alone means."""


@dataclass(frozen=True, slots=True)
class ModelSlices:
    """A slice source that only a rank can ask: there transformers' own loading code says what the rank holds.

    Attributes:
        model_class: As in `TransformersBootstrap`.
        dtype: Of the parameters, by name; None = as config.json says.
        model_arguments: As in `TransformersBootstrap`.
    """

    model_class: ModelClass
    dtype: str | None
    model_arguments: Mapping[str, Any]

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """Refuses what config.json alone shows; the rest is the ranks' to say.

        Raises:
            ShardingError: The weights are quantized.
            NotImplementedError: Always else; whoever plans leaves it to the ranks then.
        """
        refuse_quantized((index.config or {}).get("quantization_config"), index.uri)
        raise NotImplementedError("transformers' loading code says on each rank what it holds")
