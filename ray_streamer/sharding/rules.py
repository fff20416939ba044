"""Which placement has a tensor of this name? Ordered globs, the first that matches decides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ray_streamer.arguments import check_choice
from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families import family_of
from ray_streamer.sharding.globs import first_matches
from ray_streamer.sharding.name_kinds import NameKinds
from ray_streamer.sharding.placement import Placement
from ray_streamer.sharding.presets import DEFAULT_LAYOUT, Layout, preset_for
from ray_streamer.sharding.tp_plan import rules_of_plan
from ray_streamer.wording import brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of `ShardRules`.

    Attributes:
        glob: Shell pattern of whole tensor names, as in `fnmatch`: `*` crosses dots; case matters.
        placement: How the tensors lie that it matches first.
        optional: Whether a checkpoint may lack such tensors; else a rule that decides nothing is refused as a typing
            error.

    Raises:
        ShardingError: The glob is not text, or the placement is not a placement.
    """

    glob: str
    placement: Placement
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.glob, str) or not self.glob:
            raise ShardingError(f"a rule starts with a glob of tensor names, got {self.glob!r}")
        if not isinstance(self.placement, Placement):
            raise ShardingError(
                f"rule {self.glob!r} needs a placement such as Split(0) or Replicate(), got {self.placement!r}"
            )


RulesLike = Mapping[str, Placement] | Iterable["Rule | tuple[str, Placement]"]
"""What people write for rules: a mapping glob -> placement, or pairs in order; `ShardRules` are their own kind, too."""


@dataclass(frozen=True, slots=True, init=False)
class ShardRules:
    """Ordered rules; the first whose glob matches a tensor's name places it.

    >>> from ray_streamer.sharding import Replicate, ShardRules, Split
    >>> rules = ShardRules({"*.q_proj.weight": Split(0)}) + ShardRules({"*": Replicate()}, optional=True)
    >>> [rules.placement_of(name) for name in ("layers.7.q_proj.weight", "norm.weight")]
    [Split(dim=0, heads=None, kv_heads=None, parts=(), unit=None, num_parts=1), Replicate()]
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: RulesLike = (), *, optional: bool = False) -> None:
        """Rules from what people write.

        Args:
            rules: A mapping glob -> placement, an iterable of such pairs or of `Rule`s, or other `ShardRules`.
            optional: Makes every pair a rule that may decide nothing, as presets are; a `Rule` keeps its own.

        Raises:
            ShardingError: An entry is no pair of glob and placement; names it.
        """
        object.__setattr__(self, "rules", tuple(_rules_of(rules, optional=optional)))

    @classmethod
    def for_config(
        cls,
        config: Mapping[str, Any] | None,
        *,
        first: RulesLike = (),
        layout: Layout = DEFAULT_LAYOUT,
        mtp: bool = False,
    ) -> Self:
        """The preset for the model that `config`, a parsed config.json, describes.

        Args:
            config: Needs `model_type` and the sizes that its family splits by; None when the checkpoint has none.
            first: Rules that go before the preset's. With them, a model of no known family is no error: they stand
                alone, and what they do not match is for `RuleSlices` to refuse.
            layout: What the tensors are for; see `presets`.
            mtp: Whether the layers for multi-token prediction (MTP) are loaded, too.

        Raises:
            SettingsError: There is no such layout.
            ShardingError: There is no preset and nothing in `first`, or the config lacks a size.
        """
        check_choice("layout", layout, Layout)
        before, config = cls(first), config or {}
        if before.rules and family_of(config) is None:
            model_type = config.get("model_type")
            told = (
                "config.json names no model type"
                if model_type is None
                else f"no preset for model type {brief(model_type)}"
            )
            logger.warning("%s: the given rules stand alone", told)
            return before
        return before + cls(preset_for(config, layout=layout, mtp=mtp), optional=True)

    @classmethod
    def from_tp_plan(cls, plan: Mapping[str, str]) -> Self:
        """Rules for the slices that transformers makes of a tensor-parallel plan.

        They cut uneven dimensions as `torch.chunk` does, and place nothing that the plan does not name: transformers
        holds that whole on every rank, as `unmatched="replicate"` does. Every rule may decide nothing.

        >>> ShardRules.from_tp_plan({"layers.*.self_attn.o_proj": "rowwise"}).placement_of(
        ...     "model.layers.3.self_attn.o_proj.bias"
        ... )
        Replicate()

        Args:
            plan: `config.base_model_tp_plan`, or `model.tp_plan` of a model on the meta device, which also names
                embeddings and head. Its names must be those on disk, but for a prefix and for experts that are stacked
                in memory only.

        Raises:
            ShardingError: It is no plan, or has a style that is not known; names it.
        """
        return cls(rules_of_plan(plan), optional=True)

    def __add__(self, later: ShardRules) -> Self:
        return type(self)((*self.rules, *later.rules))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def placement_of(self, name: str) -> Placement | None:
        """How the tensor called `name` lies; None when no rule matches."""
        (position,) = self.first_matches(NameKinds.of((name,)))
        return None if position < 0 else self.rules[position].placement

    def first_matches(self, names: NameKinds) -> NDArray[np.int64]:
        """For each name the position of the rule that places it, -1 where none does."""
        return first_matches([rule.glob for rule in self.rules], names)


def _rules_of(rules: RulesLike, *, optional: bool) -> Iterator[Rule]:
    # The first that matches decides, and a set has no first.
    if isinstance(rules, (str, set, frozenset)) or not isinstance(rules, Iterable):
        raise ShardingError(f"rules are a mapping of glob to placement, or a list of such pairs, got {rules!r}")
    entries: list[Any] = list(rules.items() if isinstance(rules, Mapping) else rules)
    for entry in entries:
        match entry:
            case Rule():
                yield entry
            case (glob, placement):
                yield Rule(glob, placement, optional)
            case _:
                raise ShardingError(f'a rule is a pair such as ("*.q_proj.weight", Split(0)), got {entry!r}')
