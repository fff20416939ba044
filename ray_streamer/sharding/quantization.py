"""Which tensors are one quantized weight? Told by their names; what each one holds of it says `stored_form`.

    M.weight           F8, I8, or U8 with two elements a byte; beside it weight_scale, weight_scale_inv, input_scale, SCB ...
    M.weight_packed    words or bytes (compressed-tensors); beside it weight_scale, weight_zero_point, weight_shape ...
    M.qweight          words along inputs (GPTQ) or outputs (AWQ); beside it qzeros, scales, g_idx
    P_blocks           stacked experts (MXFP4 of gpt-oss); beside it P_scales
    M.weight           flat bytes (bitsandbytes, 4 bits); beside it M.weight.absmax ...

A rule for `M.weight`, or for P, places all tensors of that weight, except those that a rule names themselves.

Sources: the checkpoints of DeepSeek-V3, gpt-oss, ModelOpt, AutoAWQ, GPTQModel, compressed-tensors and bitsandbytes, and how
transformers 5.23 and vLLM 0.32 (`vllm/model_executor/parameter.py`) read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rows import distinct_rows
from ray_streamer.sharding.name_kinds import NameKinds, as_text, number_of
from ray_streamer.sharding.stored_form import HOLDERS, WHOLE, QuantizationHints, StoredForm, StoredPart, forms_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.name_kinds import Components
    from ray_streamer.sharding.rules import ShardRules

MODULE_HOLDERS = ("weight", "qweight", "weight_packed", "W_q")
"""What the tensor that holds a module's weight is called, whole or quantized."""

_BESIDE = (
    *("qweight", "qzeros", "scales", "g_idx", "input_scale", "input_global_scale", "pre_quant_scale"),
    *("SCB", "weight_format"),
)
_APPENDED = (
    "packed",
    "scale",
    "scale_inv",
    "scale_2",
    "global_scale",
    "zero_point",
    "shape",
    "g_idx",
    "blocks",
    "scales",
)
_UNDER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeights:
    """The tensors that hold quantized weights, each as part of one; one row for each part.

    Attributes:
        tensors: Position in the index.
        weight_ids: Which weight the tensor is a part of.
        form_ids: Position in `forms`.
        is_packed: Whether the tensor bears the weight's name and is not the weight element by element.
        forms: How parts hold their weights.
        wholes: For each weight the position of the tensor that bears its name; -1 where none does.
    """

    tensors: NDArray[np.int64]
    weight_ids: NDArray[np.int64]
    form_ids: NDArray[np.int64]
    is_packed: NDArray[np.bool_]
    forms: tuple[StoredForm, ...]
    wholes: NDArray[np.int64]

    def forms_by_tensor(self, num_tensors: int) -> NDArray[np.int64]:
        """For each tensor of the index the position of its form in `forms`; -1 for those of no quantized weight."""
        form_ids = np.full(num_tensors, -1, dtype=np.int64)
        form_ids[self.tensors] = self.form_ids
        return form_ids

    def lend_rules(
        self, rules: ShardRules, names: NameKinds, rule_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gives parts the rule of their weight, where they have none of their own or are packed.

        Args:
            rules: Which placement each name has.
            names: Of the tensors of the index.
            rule_ids: For each tensor the position of the rule that places it by its own name; -1 where none does.

        Returns:
            The same with rules lent, and for each tensor the form in which it lies as its weight; -1 where it lies by itself.
        """
        lent, form_ids = rule_ids.copy(), np.full(len(rule_ids), -1, dtype=np.int64)
        if not len(self.tensors):
            return lent, form_ids
        rules_of_weights = np.where(self.wholes >= 0, rule_ids[self.wholes], -1)
        self._match_unnamed(rules, names, rules_of_weights)
        part_rules = rules_of_weights[self.weight_ids]
        takes = (part_rules >= 0) & ((rule_ids[self.tensors] < 0) | self.is_packed)
        lent[self.tensors[takes]] = part_rules[takes]
        form_ids[self.tensors[takes]] = self.form_ids[takes]
        return lent, form_ids

    def _match_unnamed(self, rules: ShardRules, names: NameKinds, rules_of_weights: NDArray[np.int64]) -> None:
        """Fills in the rules of weights whose name no tensor bears."""
        unnamed = np.flatnonzero(self.wholes < 0)
        if not len(unnamed):
            return
        examples = np.empty(len(self.wholes), dtype=np.int64)
        examples[self.weight_ids] = self.tensors
        of_weights = [_weight_name(names.names[tensor]) for tensor in examples[unnamed].tolist()]
        rules_of_weights[unnamed] = rules.first_matches(NameKinds.of(of_weights))


def find_quantized(index: CheckpointIndex, names: NameKinds) -> QuantizedWeights:
    """The quantized weights of a checkpoint; `names` are those of its tensors."""
    weights: dict[Components, int] = {}
    parts: dict[str, int] = {WHOLE: 0}
    as_part = [_split(kind) for kind in names.kinds]
    for found in filter(None, as_part):
        weights.setdefault(found[0], len(weights))
        parts.setdefault(found[1], len(parts))
    roles = [
        (kind_id, weights[found[0]], parts[found[1]], found[2]) for kind_id, found in enumerate(as_part) if found
    ] + [(kind_id, weights[kind], 0, ()) for kind_id, kind in enumerate(names.kinds) if kind in weights]
    tensors, kind_of_weight, part_ids, numbers = _rows_of_roles(names, [*weights], roles)
    instances = distinct_rows([kind_of_weight, *numbers.T])
    tensor_of = np.full((len(instances.firsts), len(parts)), -1, dtype=np.int64)
    tensor_of[instances.ids, part_ids] = tensors
    has_part = tensor_of >= 0
    is_held = has_part[:, [number for part, number in parts.items() if part in HOLDERS]].any(axis=1)
    # A weight like others that are quantized may have nothing beside it.
    is_quantized = has_part[:, [number for part, number in parts.items() if part != WHOLE]].any(axis=1)
    return _with_forms(index, tensor_of[is_held & is_quantized], [*parts])


def _rows_of_roles(
    names: NameKinds, weights: list[Components], roles: list[tuple[int, int, int, tuple[int, ...]]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """One row for each tensor of each role (kind of name, kind of weight, part, further numbers), parts first.

    Returns:
        Tensor, kind of weight, part, and the weight's numbers padded with -1.
    """
    members = names.positions_by_kind()
    width = names.numbers.shape[1] + 1
    tensors = [members[kind_id] for kind_id, *_ in roles]
    counts = [len(positions) for positions in tensors]
    numbers = np.full((sum(counts), width), -1, dtype=np.int64)
    first = 0
    for (_, weight, _, further), positions in zip(roles, tensors, strict=True):
        # A weight's numbers are the first of its part's, since what a part's name adds stands behind them.
        rows = numbers[first : first + len(positions)]
        num_own = weights[weight].count(None) - len(further)
        rows[:, :num_own] = names.numbers[positions, :num_own]
        rows[:, num_own : num_own + len(further)] = further
        first += len(positions)
    first_column, second_column = (np.repeat([role[at] for role in roles], counts).astype(np.int64) for at in (1, 2))
    return np.concatenate([np.empty(0, np.int64), *tensors]), first_column, second_column, numbers


def _with_forms(index: CheckpointIndex, tensor_of: NDArray[np.int64], parts: list[str]) -> QuantizedWeights:
    """The weights whose tensors of each part `tensor_of` holds, -1 for none; weights whose parts are alike share forms."""
    hints = QuantizationHints.of(index.config)
    stored = distinct_rows([index.dtype_codes, index.num_dims, *index.shapes.T]).ids if len(index) else np.empty(0, int)
    alike = distinct_rows([np.where(tensors >= 0, stored[tensors], -1) for tensors in tensor_of.T])
    ids: dict[StoredForm, int] = {}
    forms_of_kinds = np.full((len(alike.firsts), len(parts)), -1, dtype=np.int64)
    packed_kinds = np.zeros(len(alike.firsts), dtype=bool)
    for kind, example in enumerate(alike.firsts.tolist()):
        members = {number: tensor for number, tensor in enumerate(tensor_of[example].tolist()) if tensor >= 0}
        described = {
            parts[number]: StoredPart(index.dtype_of(tensor).name, index.shape_of(tensor))
            for number, tensor in members.items()
        }
        forms = forms_of(described, hints)
        packed_kinds[kind] = WHOLE in forms and not forms[WHOLE].is_plain
        for number in members:
            forms_of_kinds[kind, number] = ids.setdefault(forms[parts[number]], len(ids))
    weight_ids, part_ids = np.nonzero(tensor_of >= 0)
    kinds = alike.ids[weight_ids]
    return QuantizedWeights(
        tensors=tensor_of[weight_ids, part_ids],
        weight_ids=weight_ids,
        form_ids=forms_of_kinds[kinds, part_ids],
        is_packed=packed_kinds[kinds] & (part_ids == parts.index(WHOLE)),
        forms=tuple(ids),
        wholes=tensor_of[:, parts.index(WHOLE)],
    )


def weight_of(kind: Components) -> str | None:
    """The weight, as rules call it, that a tensor of this kind of name would be a part of; None when it is none by its name."""
    found = _split(kind)
    return None if found is None else as_text(found[0])


def _weight_name(name: str) -> str:
    """The weight, as rules call it, that the tensor called `name` is a part of."""
    found = _split(tuple(name.split(".")))
    assert found is not None
    components, _, hidden = found
    return ".".join([*map(str, components[: -len(hidden) or None]), *map(str, hidden)])


def _split(kind: Components) -> tuple[Components, str, tuple[int, ...]] | None:
    """The weight, as rules call it, the part that a tensor of this kind would be of it, and numbers that the part's name hid.

    >>> _split(("q_proj", "qzeros")), _split(("q_proj", "weight_scale_inv")), _split(("q_proj", "weight"))
    ((('q_proj', 'weight'), 'qzeros', ()), (('q_proj', 'weight'), 'scale_inv', ()), None)
    """
    *owner, last = kind
    found = None if last is None else _split_last(last)
    if found is None:
        state = kind.index("quant_state", 1, -1) if "quant_state" in kind[1:-1] else None
        return None if state is None else (kind[:state], "quant_state", ())
    weight_last, part = found
    if weight_last is None:
        return tuple(owner), part, ()
    if (number := number_of(weight_last)) is not None:
        return (*owner, None), part, (number,)
    return (*owner, weight_last), part, ()


@cache
def _split_last(last: str) -> tuple[str | None, str] | None:
    """The same for the last component of a name; None for the weight's when the weight's whole name comes before."""
    if last in _BESIDE:
        return "weight", last
    if last in _UNDER:
        return None, last
    part = max((part for part in _APPENDED if last.endswith(f"_{part}")), key=len, default=None)
    return (last[: -len(part) - 1], part) if part else None
