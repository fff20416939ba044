"""Can transformers run this model tensor-parallel, and can its weights be read slice by slice? Refused here if not, by name.

Everything comes before any weight is read, from the config alone. The rules are those of transformers 5.23.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import CheckpointError, SettingsError, ShardingError
from ray_streamer.wording import brief, shown

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

ARGUMENTS_OF_THE_HUB = ("adapter_kwargs", "code_revision", "revision", "subfolder", "variant")
"""Arguments of transformers' `from_pretrained` that choose among the weights of a repository; here the uri does."""

LOADABLE_METHODS = ("fp8", "mxfp4")
"""Methods of quantization whose weights transformers keeps in parameters, or dequantizes while it loads."""

_HEADS = frozenset({"num_attention_heads", "num_key_value_heads"})
_LISTED = ("layer", "layers", "blocks", "labels")
"""How names of values in a config end of which transformers makes lists."""
_MOST_LISTED = 1 << 20
_LONGEST = 600


def require_transformers() -> None:
    """Refuses to go on without transformers, or without accelerate, which transformers needs to place a model on devices.

    Raises:
        SettingsError: One of them is not installed in this process's environment.
    """
    for library in ("transformers", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise SettingsError(
                f'{library} is not installed here: pip install "ray_streamer[transformers]", on every node where ranks run'
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
    chosen = sorted(name for name in ARGUMENTS_OF_THE_HUB if given.get(name))
    if chosen:
        raise SettingsError(
            f"{', '.join(chosen)} cannot be given to ray_streamer's from_pretrained, whose uri says which weights are loaded: a "
            "folder, or hf://OWNER/NAME@REVISION/FOLDER"
        )


def refuse_remote_code(asked: Any, config: Mapping[str, Any], given: Mapping[str, Any], uri: str) -> None:
    """Refuses `trust_remote_code` where transformers would run code of the checkpoint in place of its own; here none is run.

    Args:
        asked: The model class.
        config: A parsed config.json.
        given: Arguments for transformers.
        uri: The checkpoint.

    Raises:
        CheckpointError: Names the checkpoint's class.
    """
    auto_map = config.get("auto_map")
    if not given.get("trust_remote_code") or not isinstance(auto_map, dict):
        return
    if asked == "auto":
        own = [value for name, value in auto_map.items() if name == "AutoConfig" or name.startswith("AutoModel")]
    elif getattr(asked, "_model_mapping", None) is not None:
        own = [value for name, value in auto_map.items() if name in ("AutoConfig", asked.__name__)]
    else:
        # A model's class is what it is, whatever auto_map says.
        own = []
    if own:
        raise CheckpointError(
            f"{uri}: trust_remote_code asks for the checkpoint's own {brief(own[-1])}, which auto_map of config.json names, and "
            "ray_streamer's from_pretrained runs no code of checkpoints. Leave trust_remote_code out to load transformers' own class; "
            "to run the checkpoint's, fetch it with ray_streamer.pull and load it with transformers"
        )


def refuse_endless(config: Mapping[str, Any], uri: str) -> None:
    """Refuses numbers of layers and labels that no model has: transformers makes lists that long of them.

    Args:
        config: A parsed config.json, with what the caller says instead of its values.
        uri: The checkpoint.

    Raises:
        CheckpointError: Names the value.
    """
    level: list[Any] = [config]
    while level:
        pairs = [pair for value in level if isinstance(value, dict) for pair in value.items()]
        for name, value in pairs:
            if str(name).endswith(_LISTED) and isinstance(value, int) and value > _MOST_LISTED:
                raise CheckpointError(
                    f"{uri}: config.json says {shown(str(name))} is {brief(value)}; a model has at most {_MOST_LISTED}"
                )
        items = [value for outer in level if isinstance(outer, list) for value in outer]
        level = [value for value in [*(value for _, value in pairs), *items] if isinstance(value, dict | list)]


def told_by_transformers(error: BaseException) -> str:
    """What an error of transformers is, on one line: without the C++ frames that torch puts behind it, and of bounded length."""
    said = " ".join(str(error).partition("\nException raised from")[0].split())
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + '...'}"


def refuse_quantized(said: Any, uri: str) -> None:
    """Refuses checkpoints of quantized weights, but for those of `LOADABLE_METHODS`.

    The others have modules of their own, whose weights transformers makes outside of its loading.

    Args:
        said: The config's quantization_config; None where it has none.
        uri: The checkpoint.

    Raises:
        ShardingError: Names the quantization.
    """
    method = quantization_of(said)
    if said is not None and method not in LOADABLE_METHODS:
        raise ShardingError(
            f"{uri}: its weights are quantized ({method or 'no quant_method'}), which ray_streamer's from_pretrained does not "
            f"load; it loads {' and '.join(LOADABLE_METHODS)}. load_rank and vLLM's load format ray_streamer load others, too"
        )


def refuse_packed(config: PretrainedConfig, device: str, uri: str) -> None:
    """Refuses MXFP4 weights where transformers keeps them packed, which it does for kernels of a GPU.

    They become objects of Triton there, not parameters. Elsewhere transformers dequantizes them while it loads.

    Raises:
        ShardingError: transformers would keep them.
    """
    said: Any = getattr(config, "quantization_config", None)
    if quantization_of(said) != "mxfp4" or device == "cpu":
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(said, pre_quantized=True)
    quantizer.validate_environment(device_map={"": device})
    if not quantizer.quantization_config.dequantize:
        raise ShardingError(
            f"{uri}: its weights are MXFP4, which transformers keeps packed for the kernels of {device}, outside of parameters. "
            'Set "dequantize": true in the quantization_config of config.json, or use vLLM\'s load format ray_streamer'
        )


def quantization_of(said: Any) -> str | None:
    """The method that a config's quantization_config names.

    >>> quantization_of({"quant_method": "fp8"}), quantization_of(None)
    ('fp8', None)
    """
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def refuse_uncuttable(config: PretrainedConfig, tp: int, uri: str) -> None:
    """Refuses a model that transformers has no plan for, or whose plan cuts attention between heads that `tp` does not divide.

    transformers itself would cut a head in half there, and fail in the first forward. Other sizes need not divide. Some plans,
    such as that of DeepSeek V4, cut experts only.

    Raises:
        ShardingError: Names the model's type or number of heads, with a layer where they differ, and the values of tp that work.
    """
    if tp == 1:
        return
    text: Any = config.get_text_config()
    plan = {**(getattr(text, "base_model_tp_plan", None) or {}), **(getattr(config, "base_model_tp_plan", None) or {})}
    if not plan:
        raise ShardingError(
            f"{uri}: transformers has no tensor-parallel plan for model type {config.model_type}; load it with tp=1"
        )
    sizes = _heads_of(text) if any("attn" in name or "attention" in name for name in plan) else {}
    wrong = [said for said, value in sizes.items() if value % tp]
    if wrong:
        works = [n for n in range(1, min(sizes.values()) + 1) if not any(value % n for value in sizes.values())]
        raise ShardingError(
            f"{uri}: tp={tp} does not divide {', '.join(wrong)}; tp that work: {', '.join(map(str, works))}"
        )


def _heads_of(config: Any) -> dict[str, int]:
    """Every number of heads in a config, by its words; of numbers that differ by layer each one, with the first layer that has it."""
    by_layer = _HEADS & set(getattr(config, "per_layer_attributes", None) or ())
    layers: list[Any] = list(config.per_layer_config) if by_layer else []
    sizes: dict[tuple[str, int], str] = {}
    for name in sorted(_HEADS):
        # The config refuses to say one number for all layers where they differ.
        for number, holder in enumerate(layers if name in by_layer else [config]):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                of_layer = f" of layer {number}" if name in by_layer else ""
                sizes.setdefault((name, value), f"{name}={value}{of_layer}")
    return {said: value for (_, value), said in sizes.items()}
