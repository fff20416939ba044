"""Which model families are known? Each is a few lines of data: names on disk and what they mean.

Sources: transformers 5.23, the modules, tensor-parallel plans and checkpoint names of each family.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding.families.classics import CLASSICS
from ray_streamer.sharding.families.dense import DENSE
from ray_streamer.sharding.families.family import Family, Meaning, Role, Weight
from ray_streamer.sharding.families.mixtures import MIXTURES
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FAMILIES",
    "RENAMED",
    "Family",
    "Meaning",
    "Role",
    "Weight",
    "check_model_type",
    "family_of",
    "family_or_refuse",
]

FAMILIES: dict[str, Family] = DENSE | MIXTURES | CLASSICS
"""Model type, as config.json spells it -> family."""


RENAMED: dict[str, str] = {
    "arcee": "llama",
    "cwm": "llama",
    "deepseek_v32": "deepseek_v3",
    "dots1": "glm4_moe",
    "ernie4_5": "llama",
    "exaone4": "llama",
    "glm4_moe_lite": "deepseek_v3",
    "glm_moe_dsa": "deepseek_v3",
    "helium": "llama",
    "hunyuan_v1_dense": "llama",
    "hyperclovax": "llama",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "kimi_k2": "deepseek_v3",
    "nemotron": "llama",
    "seed_oss": "llama",
    "smollm3": "llama",
    "solar_open": "glm4_moe",
    "stablelm": "llama",
    "vaultgemma": "gemma",
}
"""Model types whose tensors have the names of another one's, and lie as they do; what only one of them has is optional.

A test compares each with the files that transformers 5.23 writes, except `kimi_k2`, whose code is DeepSeek-V3's own.
"""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of the model that `config`, a parsed config.json, describes; None when it is not known."""
    model_type = config.get("model_type")
    return FAMILIES.get(RENAMED.get(model_type, model_type)) if isinstance(model_type, str) else None


def check_model_type(model_type: str) -> None:
    """Refuses a model type that is not known here.

    Raises:
        SettingsError: Names the nearest that are.
    """
    if not isinstance(model_type, str) or family_of({"model_type": model_type}) is None:
        near = difflib.get_close_matches(str(model_type), [*FAMILIES, *RENAMED], 3)
        known = (
            f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted({*FAMILIES, *RENAMED}))}"
        )
        raise SettingsError(f"model_type={model_type!r} is none that has a preset; {known}")


def family_or_refuse(config: Mapping[str, Any]) -> Family:
    """As `family_of`.

    Raises:
        ShardingError: The config's model type is not among `FAMILIES`.
    """
    family = family_of(config)
    if family is None:
        raise ShardingError(
            f"no preset for model type {brief(config.get('model_type'))} of config.json; known are "
            f"{', '.join(sorted(FAMILIES))}, and as one of these {', '.join(RENAMED)}. Give rules of your own, for example "
            'rules={"*.q_proj.weight": Split(0), "*.o_proj.weight": Split(1)}'
        )
    return family
