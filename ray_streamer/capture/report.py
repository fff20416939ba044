"""What became of each tensor that a loader was given? Planned, cast, made early, read whole, or never looked at."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors that went the same way.

    Attributes:
        num_bytes: Of the checkpoint's bytes that the loader took of them (planned, cast), or that were read (early, whole).
        names: Of the tensors, in the order in which the loader met them.
    """

    num_bytes: int
    names: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReport:
    """What one rank's loader did with the tensors that it was given; a tensor may be in several groups.

    Attributes:
        planned: Parts of these are copied as they are.
        cast: Parts of these are cast on their way.
        early: These were read whole during the dry run, since the loader touched what it had copied of them before.
        whole: These were read whole during the dry run, for their values.
        reasons: For each tensor of `whole`, the operation that first needed its values.
        unused: The loader copied nothing of these and asked for no values.
    """

    planned: Group
    cast: Group
    early: Group
    whole: Group
    reasons: dict[str, str] = field(repr=False)
    unused: Group
