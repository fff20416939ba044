"""What does one say of a model family? Names, as they are on disk, and what each of them means; no number of any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto


class Role(Enum):
    """What a linear module does with its input; weights are [outputs, inputs]."""

    QUERY = auto()
    KEY_VALUE = auto()
    FUSED_QKV = auto()
    ATTENTION_OUTPUT = auto()
    COLUMN_PARALLEL = auto()
    FUSED_GATE_UP = auto()
    ROW_PARALLEL = auto()
    VOCABULARY = auto()
    REPLICATED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    All globs are those of `fnmatch` and see whole tensor names, unless they are said to name modules.

    Attributes:
        modules: Glob of a module's name -> its role.
        towers: Globs of all tensors of other modalities' parts, which are replicated and come before everything else.
        text_config: Key of the config that holds the language model's sizes; None when they are at the top.
        defaults: Sizes that the family's config.json may leave out.
        layers: Component of a name that the number of a layer follows.
        first_stage: Globs of what the first layer needs before it, such as the embeddings.
        last_stage: Globs of what follows the last layer, such as the head; seen only by names outside of the layers.
        experts: Component of a name that an expert's number follows, where each expert has tensors of its own.
        stacked_experts: Globs of tensors that hold one expert per index of their first dimension.
        num_experts: Keys of the config that may hold the number of routed experts; empty when there are none.
        num_draft_layers: Key of the config that holds how many layers for multi-token prediction are numbered on after
            the model's own; None when the family has none.
        drafts: Globs of further tensors that only multi-token prediction uses.
    """

    modules: dict[str, Role]
    towers: tuple[str, ...] = ()
    text_config: str | None = None
    defaults: dict[str, int] = field(default_factory=dict[str, int])
    layers: str = "layers"
    first_stage: tuple[str, ...] = ("*embed_tokens.*",)
    last_stage: tuple[str, ...] = ("*lm_head.*", "*norm.*")
    experts: str = "experts"
    stacked_experts: tuple[str, ...] = ()
    num_experts: tuple[str, ...] = ()
    num_draft_layers: str | None = None
    drafts: tuple[str, ...] = ()
