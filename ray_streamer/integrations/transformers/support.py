"""Can transformers run this model tensor-parallel, and can its weights be read slice by slice? Refused here if not, by name.

Everything comes before any weight is read, from the config alone. The rules are those of transformers 5.23.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError, ShardingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

OWN_ARGUMENTS = (
    "config",
    "device_map",
    "device_mesh",
    "distributed_config",
    "gguf_file",
    "output_loading_info",
    "quantization_config",
    "state_dict",
    "tp_plan",
    "tp_size",
)
"""Arguments of transformers' `from_pretrained` that this package gives itself, or that change where weights come from."""

_HEADS = ("num_attention_heads", "num_key_value_heads")


def refuse_absent() -> None:
    """Refuses to go on without transformers.

    Raises:
        SettingsError: It is not installed in this process's environment.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SettingsError(
            'transformers is not installed here: pip install "ray_streamer[transformers]", on every node where ranks run'
        )


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Refuses arguments for transformers that have no meaning here.

    Raises:
        SettingsError: Names them.
    """
    refused = sorted(given.keys() & set(OWN_ARGUMENTS))
    if refused:
        raise SettingsError(
            f"{', '.join(refused)} cannot be given to ray_streamer's from_pretrained, which sets them itself; say tp, device "
            "and dtype instead"
        )


def refuse_quantized(said: Any, uri: str) -> None:
    """Refuses checkpoints of quantized weights.

    transformers rewrites their modules and converts their values while it loads.

    Args:
        said: The config's quantization_config; None where it has none.
        uri: The checkpoint.

    Raises:
        ShardingError: Names the quantization.
    """
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    raise ShardingError(
        f"{uri}: its weights are quantized ({getattr(method, 'value', method) or 'no quant_method'}), which ray_streamer's "
        "from_pretrained does not load. load_rank and vLLM's load format ray_streamer do"
    )


def refuse_uncuttable(config: PretrainedConfig, tp: int, uri: str) -> None:
    """Refuses a model that transformers has no plan for, or whose attention heads `tp` does not divide.

    transformers itself would cut a head in half there, and fail in the first forward. Other sizes need not divide.

    Raises:
        ShardingError: Names the model's type or number of heads, and the values of tp that work.
    """
    if tp == 1:
        return
    text: Any = config.get_text_config()
    if not (getattr(text, "base_model_tp_plan", None) or getattr(config, "base_model_tp_plan", None)):
        raise ShardingError(
            f"{uri}: transformers has no tensor-parallel plan for model type {config.model_type}; load it with tp=1"
        )
    sizes = {name: value for name in _HEADS if isinstance(value := getattr(text, name, None), int)}
    wrong = {name: value for name, value in sizes.items() if value % tp}
    if wrong:
        works = [n for n in range(1, min(sizes.values()) + 1) if not any(value % n for value in sizes.values())]
        raise ShardingError(
            f"{uri}: tp={tp} does not divide {', '.join(f'{name}={value}' for name, value in wrong.items())}; "
            f"tp that work: {', '.join(map(str, works))}"
        )
