"""How do a rank's results become DTensors? Their placements follow from what all ranks hold, before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError
from ray_streamer.sharding.global_form import global_forms
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.global_form import GlobalForm
    from ray_streamer.slices import RankSlices, SliceSource


class DTensorSlices:
    """A slice source around rules, which also says of which DTensors the results are parts.

    Args:
        source: The rules.
        device_mesh: The ranks that share tensors: of one dimension, or one of its dimensions is called "tp".
        device: Where the tensors go.

    Raises:
        SettingsError: The source is none of rules, or the mesh is none, lies on another device or has another size than its tp.
    """

    def __init__(self, source: SliceSource, device_mesh: DeviceMesh, *, device: str) -> None:
        if not isinstance(source, RuleSlices):
            raise SettingsError(
                "as_dtensor goes with rules, which know what other ranks hold; slices say their own rank only"
            )
        self._source = source
        _check_mesh(device_mesh, device)
        self._device_mesh = _line_of(device_mesh)
        self._forms: dict[str, GlobalForm] = {}
        if self._device_mesh.size() != source.mesh.tp:
            raise SettingsError(
                f"as_dtensor is a mesh of {self._device_mesh.size()} ranks for tensors that tp={source.mesh.tp} divides: give a "
                "mesh of as many, such as init_device_mesh(device, (tp,))"
            )

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """What the rules say.

        Raises:
            SettingsError: This rank is another one in the device mesh.
            ShardingError: As the rules; or a result is no part of a DTensor.
        """
        mesh = self._source.mesh
        mine = mesh.coordinate(rank)
        peers = [other for other in range(mesh.num_ranks) if mesh.coordinate(other) | {"tp": mine["tp"]} == mine]
        own = peers.index(rank)
        if own != self._device_mesh.get_local_rank():
            raise SettingsError(
                f"rank {rank} of this load is number {own} of tp, and number {self._device_mesh.get_local_rank()} of as_dtensor"
            )
        said = [self._source(index, peer) for peer in peers]
        self._forms = global_forms(index, said, own)
        return said[own]

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The DTensor of which `local` is this rank's part; both have one memory."""
        from torch import Size
        from torch.distributed.tensor import DTensor, Replicate, Shard

        form = self._forms[name]
        placement: Any = Replicate() if form.dim is None else Shard(form.dim)
        shape, stride = Size(form.shape), row_major(form.shape)
        return DTensor.from_local(local, self._device_mesh, [placement], run_check=False, shape=shape, stride=stride)


def _check_mesh(device_mesh: object, device: str) -> None:
    """Refuses what is no mesh, and one whose device torch would move the tensors to."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(device_mesh, DeviceMesh):
        raise SettingsError(
            f"as_dtensor is a device mesh, such as init_device_mesh(device, (tp,)), got {type(device_mesh).__name__}"
        )
    if device_mesh.device_type != device.partition(":")[0]:
        raise SettingsError(
            f"as_dtensor is a mesh of {device_mesh.device_type} devices, and the tensors go to {device}: give one of the "
            "same kind, or another device"
        )


def _line_of(device_mesh: DeviceMesh) -> DeviceMesh:
    """The dimension of a mesh over which tensors are cut.

    Raises:
        SettingsError: It is not known which one.
    """
    if device_mesh.ndim == 1:
        return device_mesh
    names = device_mesh.mesh_dim_names or ()
    if "tp" not in names:
        raise SettingsError(
            f'as_dtensor has {device_mesh.ndim} dimensions, none of which is called "tp": give mesh["tp"], or name them'
        )
    return device_mesh["tp"]
