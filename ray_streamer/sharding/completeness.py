"""Is all of a model there? What config.json and the family's names lead one to expect, against what the files hold.

Judged is what the caller gave as a whole: a folder. With an index json, the index decides, and what the config expects
beyond it is a warning. Without one, nothing else tells of a file that is not there, so what is missing is refused:

- a layer below `num_hidden_layers` without any tensor;
- a layer without a module that the others have, unless the family's layers differ in it;
- an expert of a layer that has others, below the config's number of experts;
- where there are several files: embeddings, the last norm, or a head that is not tied; a weight, scale or bias of a module that most modules like
  it have.

Not judged is what the caller named on purpose, one file or an index json of his own; a family that is not known; MTP layers,
which have layers and modules of their own.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.errors import CheckpointError, IndexMismatchError
from ray_streamer.rows import distinct, distinct_rows
from ray_streamer.sharding.families import family_of
from ray_streamer.sharding.globs import matches_any, starred
from ray_streamer.sharding.model_structure import ModelStructure
from ray_streamer.sharding.name_kinds import NameKinds, as_text, kinds_of_tensors
from ray_streamer.sharding.placement import Skip
from ray_streamer.sharding.quantization import MODULE_HOLDERS, weight_of
from ray_streamer.sharding.sizes import Sizes
from ray_streamer.units import counted, verb
from ray_streamer.wording import listed, printable, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.families.family import Family
    from ray_streamer.sharding.model_structure import Locations
    from ray_streamer.sharding.rules import ShardRules

_NORM = re.compile(r"norm|(?:^|\.)ln_[0-9a-z]+$")

_logger = logging.getLogger(__name__)


def refuse_incomplete(index: CheckpointIndex) -> None:
    """Raise, or with an index json warn, when the files of a folder lack parts of the model.

    Raises:
        CheckpointError: The folder has no index json, and parts are missing; lists them.
        ShardingError: The config of a known family has something else where a number of layers or experts is due.
    """
    if index.found_by == "name" or not (faults := missing_parts(index)):
        return
    told = f"config.json and the other tensors lead one to expect more than {printable(index.uri)} has: {'; '.join(faults)}"
    if index.found_by == "index":
        _logger.warning("%s. Its index json names no more, and decides.", told)
        return
    what = "the one file" if len(index.files) == 1 else "one of its files, or of an index json that names the tensors"
    raise CheckpointError(
        f"{index.uri} is incomplete: {'; '.join(faults)}. Fetch it again, or wait until it is written; to load only what is "
        f"there, give the uri of {what}"
    )


def refuse_absent(index: CheckpointIndex, rules: ShardRules) -> None:
    """Raise when a tensor that the index json names is in no file, and a rank would hold a part of it.

    Nobody needs what rules skip, a head that is tied to the embeddings, and names of which neither a rule nor a tensor of
    another layer tells what they are.

    Raises:
        IndexMismatchError: Lists the tensors.
    """
    if not index.absent:
        return
    names = NameKinds.of(index.absent)
    weights = NameKinds.of([weight_of(names.kinds[kind]) or "" for kind in names.kind_ids.tolist()])
    by_name, by_weight = rules.first_matches(names), rules.first_matches(weights)
    rule_ids = np.where(by_name >= 0, by_name, by_weight).tolist()
    held = set(kinds_of_tensors(index).kinds)
    is_alike = names.of_kinds([kind in held for kind in names.kinds], dtype=bool)
    structure = _structure_of(index)
    is_end, is_tied_head = _ends(index, names, structure)
    needed = [
        name
        for name, rule_id, is_known, is_tied in zip(
            names.names, rule_ids, (is_alike | is_end).tolist(), is_tied_head.tolist(), strict=True
        )
        if (is_known if rule_id < 0 else not is_tied and not isinstance(rules.rules[rule_id].placement, Skip))
    ]
    if needed:
        raise IndexMismatchError(
            f"{index.uri}: {counted(len(needed), 'tensor')} that its index json names {verb(len(needed), 'is', 'are')} in none of its "
            f"files, and the model needs {verb(len(needed), 'it', 'them')}: {listed([*map(shown, needed)])}; fetch the files again "
            "from the revision of the index json"
        )


def _ends(
    index: CheckpointIndex, names: NameKinds, structure: ModelStructure | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which names stand before or behind the layers, and which are a head that is tied to the embeddings."""
    if structure is None:
        return np.zeros(len(names), dtype=np.bool_), np.zeros(len(names), dtype=np.bool_)
    said = Sizes(structure.family, index.config or {}).says_tied
    is_tied = structure.family.is_tied if said is None else said
    located = structure.locate(names)
    return located.is_before_layers | located.is_after_layers, located.is_after_layers & is_tied


def missing_parts(index: CheckpointIndex) -> list[str]:
    """What the checkpoint lacks of the model that its config.json describes, one clause each; empty when that is unknown."""
    structure = _structure_of(index)
    if structure is None:
        return []
    names = kinds_of_tensors(index)
    located = structure.locate(names)
    is_own = (located.layers >= 0) & (located.layers < structure.num_layers)
    if not is_own.any():
        # Drafts alone, or a model with names of its own.
        return []
    held = _Held.of(names, located, is_own, structure)
    clauses = [
        *_missing_layers(held, structure),
        *_missing_modules(held, structure),
        *_missing_experts(held, structure),
    ]
    if len(index.files) > 1:
        clauses += _missing_tensors(index, names, is_own, structure)
        clauses += _missing_ends(index, names, located, structure)
    return clauses


@dataclass(frozen=True, slots=True)
class _Held:
    """What the files hold of the model's own layers. Pairs of layer and module are numbered in rows of `len(modules)`.

    Attributes:
        layers: Those that have tensors; sorted.
        modules: Names of modules from their layer on, with `*` for numbers.
        pairs: Layer and module that there are; sorted, int64.
        expert_pairs: Those of single experts; sorted, int64.
        expert_counts: How many of the config's experts each of them has; int64.
    """

    layers: NDArray[np.int64]
    modules: tuple[str, ...]
    pairs: NDArray[np.int64]
    expert_pairs: NDArray[np.int64]
    expert_counts: NDArray[np.int64]

    @classmethod
    def of(cls, names: NameKinds, located: Locations, is_own: NDArray[np.bool_], structure: ModelStructure) -> _Held:
        ids: dict[str, int] = {}
        in_layer = _in_layer(structure)
        of_kinds = [ids.setdefault(_module_in_layer(text, in_layer), len(ids)) for text in _weights_of(names)]
        pairs = (located.layers * len(ids) + names.of_kinds(of_kinds))[is_own]
        experts = located.experts[is_own]
        is_expert = (experts >= 0) & (experts < structure.num_experts)
        single = distinct(pairs[is_expert] * max(1, structure.num_experts) + experts[is_expert])
        expert_pairs, counts = np.unique(single // max(1, structure.num_experts), return_counts=True)
        pairs = distinct(pairs)
        return cls(distinct(pairs // len(ids)), tuple(ids), pairs, expert_pairs, counts)

    def layers_of(self, modules: Sequence[int]) -> NDArray[np.int64]:
        """The layers that have any of these modules; sorted."""
        return distinct(self.pairs[np.isin(self.pairs % len(self.modules), modules)] // len(self.modules))


def _weights_of(names: NameKinds) -> list[str]:
    """Every kind as the name of the weight that it is, or is a part of."""
    return [weight_of(kind) or as_text(kind) for kind in names.kinds]


def _in_layer(structure: ModelStructure) -> re.Pattern[str]:
    """Finds what stands behind the layer's number in a name."""
    return re.compile(rf"(?:^|\.){re.escape(structure.family.layers)}\.[0-9]+\.(.+)$", re.DOTALL)


def _module_in_layer(name: str, in_layer: re.Pattern[str]) -> str:
    found = in_layer.search(name)
    return starred(found[1].rpartition(".")[0] or found[1]) if found else ""


def _missing_layers(held: _Held, structure: ModelStructure) -> Iterator[str]:
    if num_missing := structure.num_layers - len(held.layers):
        # The first number that is not where it would be if none were missing.
        first = int(np.argmax(np.append(held.layers, -1) != np.arange(len(held.layers) + 1)))
        yield f"{num_missing} of the {counted(structure.num_layers, 'layer')} of config.json {verb(num_missing, 'is', 'are')} missing, such as layer {first}"


def _missing_modules(held: _Held, structure: ModelStructure) -> Iterator[str]:
    # Globs of families begin with "*.", so a dot before the module lets them match.
    known = matches_any(structure.family.modules, [f".{module}" for module in held.modules])
    varying = matches_any(structure.family.varying, [f".{module}." for module in held.modules])
    # Not those of towers, which have layers of their own.
    here = distinct(held.pairs % len(held.modules)).tolist()
    wanted = [number for number in here if known[number] or _NORM.search(held.modules[number])]
    alike = [[number] for number in wanted if not varying[number]]
    either = [number for number in wanted if varying[number]]
    for modules in [*alike, either] if either else alike:
        layers = held.layers_of(modules)
        if num_missing := len(held.layers) - len(layers):
            first = held.layers[~np.isin(held.layers, layers)][0]
            more = f" and {num_missing - 1} more" if num_missing > 1 else ""
            yield f"layer {first}{more} has no {' or '.join(shown(held.modules[number]) for number in modules[:4])}"


def _missing_experts(held: _Held, structure: ModelStructure) -> Iterator[str]:
    lacking = np.flatnonzero(held.expert_counts < structure.num_experts)
    if len(lacking):
        layer, module = divmod(int(held.expert_pairs[lacking[0]]), len(held.modules))
        more = f", and so in {counted(len(lacking) - 1, 'more place')}" if len(lacking) > 1 else ""
        yield (
            f"layer {layer} has {shown(held.modules[module])} of {held.expert_counts[lacking[0]]} of the "
            f"{counted(structure.num_experts, 'expert')} of config.json{more}"
        )


def _missing_tensors(
    index: CheckpointIndex, names: NameKinds, is_own: NDArray[np.bool_], structure: ModelStructure
) -> Iterator[str]:
    """Tensors that a module lacks, and most have that are like it: of the same name in their layers, for scales also of the same dtype."""
    in_layer = _in_layer(structure)
    found = [in_layer.search(as_text(kind)) if kind[-1] is not None else None for kind in names.kinds]
    split = [match[1].rpartition(".") if match else ("", "", "") for match in found]
    varying = matches_any(structure.family.varying, [f".{module}." for module, _, _ in split])
    modules: dict[str, int] = {}
    parts: dict[str, int] = {}
    of_kinds = np.full((len(names.kinds), 2), -1, dtype=np.int64)
    for number, (module, _, part) in enumerate(split):
        if module and not varying[number]:
            of_kinds[number] = (
                modules.setdefault(starred(module), len(modules)),
                parts.setdefault(part, len(parts)),
            )
    module_ids, part_ids = of_kinds[names.kind_ids].T
    (tensors,) = np.nonzero((module_ids >= 0) & is_own)
    if not len(tensors):
        return
    instances = distinct_rows([module_ids[tensors], *names.numbers[tensors].T])
    has = np.full((len(instances.firsts), len(parts)), -1, dtype=np.int64)
    has[instances.ids, part_ids[tensors]] = tensors
    held = np.stack([has[:, parts[holder]] for holder in MODULE_HOLDERS if holder in parts] or [has[:, 0]]).max(axis=0)
    of_modules = module_ids[tensors][instances.firsts]
    # Layers that a quantizer left alone have weights of another dtype, and no scales.
    of_dtypes = distinct_rows([of_modules, np.where(held >= 0, index.dtype_codes[held], -1)]).ids
    for part, number in parts.items():
        is_of_a_dtype = part not in MODULE_HOLDERS and weight_of(("", part)) is not None
        alike = of_dtypes if is_of_a_dtype else of_modules
        counts, having = np.bincount(alike), np.bincount(alike, weights=has[:, number] >= 0)
        (lacking,) = np.nonzero((has[:, number] < 0) & (2 * having > counts)[alike])
        if len(lacking):
            example = names.names[tensors[instances.firsts[lacking[0]]]].rpartition(".")[0]
            more = f", and so in {counted(len(lacking) - 1, 'more place')}" if len(lacking) > 1 else ""
            yield f"{shown(example)} has no {part}{more}"


def _missing_ends(
    index: CheckpointIndex, names: NameKinds, located: Locations, structure: ModelStructure
) -> Iterator[str]:
    family = structure.family
    globs = (*(f"{glob}.*" for glob in family.modules), *family.mtp, *family.skipped)
    is_known = names.of_kinds(matches_any(globs, names.texts), dtype=bool)
    is_known |= located.is_before_layers | located.is_after_layers | located.is_tower | (located.layers >= 0)
    if not is_known.all():
        # A model with parts that its family does not have, such as a draft's: who knows what it leaves out.
        return
    is_last = located.is_after_layers & ~located.is_mtp
    norms = _norms_of(family)
    if not (located.is_before_layers & ~located.is_mtp).any():
        yield f"the embeddings ({', '.join(family.first_stage)}) are missing"
    if norms and not is_last.any():
        yield f"what follows the last layer ({', '.join(family.last_stage)}) is missing"
    elif norms and not (is_last & names.of_kinds(matches_any(norms, names.texts), dtype=bool)).any():
        yield f"the last norm ({', '.join(norms)}) is missing"
    elif _has_own_head(index.config or {}) and not (is_last & (index.num_dims >= 2)).any():
        yield "the head is missing, which config.json does not tie to the embeddings"


def _norms_of(family: Family) -> list[str]:
    return [glob for glob in family.last_stage if "norm" in glob or "ln_" in glob]


def _structure_of(index: CheckpointIndex) -> ModelStructure | None:
    """The parts of the model; None when its config does not tell."""
    config = index.config or {}
    family = family_of(config)
    return ModelStructure.of(config) if family is not None and Sizes(family, config).says_layers else None


def _has_own_head(config: Mapping[str, Any]) -> bool:
    """Whether the config says outright that the model has a head, and not the embeddings' tensor."""
    architectures = config.get("architectures")
    is_with_head = isinstance(architectures, list) and any(str(name).endswith("ForCausalLM") for name in architectures)
    return is_with_head and config.get("tie_word_embeddings") is False
