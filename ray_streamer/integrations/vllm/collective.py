"""What do the ranks that load a model tell each other? Small Python values, over vLLM's own process groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist

Value = TypeVar("Value")


def gather(mine: Value, group: dist.ProcessGroup | None) -> list[Value]:
    """Every rank's value, in the group's order; every rank of the group calls it. None is a rank on its own."""
    import torch.distributed as dist

    if group is None:
        return [mine]
    everyones = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    return everyones


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Whether this is the group's first rank."""
    import torch.distributed as dist

    return group is None or dist.get_rank(group) == 0
