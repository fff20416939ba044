"""What must be known of a model family? Names, as they are on disk, and what each of them means; no number of any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto


class Role(Enum):
    """What a tensor does; heads and halves are told by a config's sizes."""

    QUERY = auto()
    KEY_VALUE = auto()
    FUSED_QKV = auto()
    """All queries, then all keys, then all values."""
    GROUPED_QKV = auto()
    """For each key-value head its queries, its key and its value."""
    ATTENTION_OUTPUT = auto()
    COLUMN_PARALLEL = auto()
    FUSED_GATE_UP = auto()
    """All of the gate, then all of the up projection."""
    ROW_PARALLEL = auto()
    VOCABULARY = auto()
    LINEAR_KEY_GROUPS = auto()
    """Linear attention: for each key head its query, its key and what belongs to its value heads."""
    LINEAR_VALUES = auto()
    """Linear attention: one run of indices for each value head."""
    LINEAR_FUSED_QKV = auto()
    """Linear attention: all queries, then all keys, then all values."""
    LINEAR_OUTPUT = auto()
    CONTIGUOUS = auto()
    """One run of outputs per rank, whatever they are made up of; whoever runs the model gathers them."""
    REPLICATED = auto()


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor whose dimensions are not [outputs, inputs].

    Attributes:
        role: What it does.
        outputs: Dimension that counts outputs.
        inputs: Dimension that counts inputs.
        unit: Indices that must stay together, such as a quantization block; ranks then hold whole units, the last ones
            less than others or nothing. None when each must hold an equal share.
    """

    role: Role
    outputs: int = 0
    inputs: int = 1
    unit: int | None = None


Meaning = Role | Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    All globs are those of `fnmatch` and see whole tensor names, unless they are said to name modules.

    Attributes:
        modules: Glob of a module's name -> what its weight does; its bias is as long as the outputs.
        tensors: Glob of a tensor -> what it does; for those that are no linear module's weight or bias.
        skipped: Globs of what old checkpoints hold beside weights, such as causal masks; never read.
        towers: Globs of all tensors of other modalities' parts, which are replicated and come before everything else.
        transformers: Where the tensor-parallel plan of transformers differs: glob of a tensor -> what it does there;
            None when transformers has no plan. What is cut is named to the end: scales go with their weights.
        text_config: Key of the config that holds the language model's sizes; None when they are at the top.
        defaults: Sizes that the family's config.json may leave out.
        layers: Component of a name that the number of a layer follows.
        first_stage: Globs of what the first layer needs before it, such as the embeddings.
        last_stage: Globs of what follows the last layer, such as the head; seen only by names outside of the layers.
        experts: Component of a name that an expert's number follows, where each expert has tensors of its own.
        stacked_experts: Globs of tensors that hold one expert per index of their first dimension.
        num_experts: Keys of the config that may hold the number of routed experts; empty when there are none.
        num_mtp_layers: Key of the config that holds how many layers for multi-token prediction are numbered on after
            the model's own; None when the family has none.
        mtp: Globs of further tensors that only multi-token prediction uses.
        varying: Globs of tensors, from their layer on, in which layers of one model differ; each layer has some of them.
        is_tied: Whether the embedding is the head, too, where config.json does not say.
    """

    modules: dict[str, Meaning]
    tensors: dict[str, Meaning] = field(default_factory=dict[str, Meaning])
    skipped: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    transformers: dict[str, Meaning] | None = field(default_factory=dict[str, Meaning])
    text_config: str | None = None
    defaults: dict[str, int] = field(default_factory=dict[str, int])
    layers: str = "layers"
    first_stage: tuple[str, ...] = ("*embed_tokens*",)
    last_stage: tuple[str, ...] = ("*lm_head.*", "*norm.*")
    experts: str = "experts"
    stacked_experts: tuple[str, ...] = ()
    num_experts: tuple[str, ...] = ()
    num_mtp_layers: str | None = None
    mtp: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()
    is_tied: bool = False
