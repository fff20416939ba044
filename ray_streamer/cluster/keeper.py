"""Who removes a placement group whose owner was killed? A small actor that outlives the owner and watches it.

Ray removes a placement group when the job that made it ends. A driver is its job, so nothing is needed for it. An actor, a
task or a Serve replica is not: when one is killed, or its handle goes out of scope, its ranks die with it, and their
resources would stay reserved until the whole job ends.

The keeper is detached, and reserves next to nothing, of the head node. It is there before the group, and knows the group
by its name, so that no moment is left in which a caller that dies leaves a group behind. It looks once a second whether
Ray still counts the owner's process and node as alive, and ends with its group, whoever ends that.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
import ray._private.state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

if TYPE_CHECKING:
    from ray_streamer.cluster.names import GroupName

_NAMESPACE = "ray_streamer"
# Ray gives one of it to the head node. A soft affinity to that node would be followed most times only, and a hard one ends with the node.
_ON_THE_HEAD = {"node:__internal_head__": 0.0001}
_LOOK_SECONDS = 1.0
_LOOKS_AFTER_THE_OWNER = 3
_MOST_LOOKS_FOR_ACCEPTANCE = 500


class Keeper:
    """Removes one placement group after its owner, and then itself.

    Args:
        label: How Ray's dashboard and logs show it.
        group_name: Name of what to remove; no other group has it.
        owner_id: Ray's id of the owner's process.
        node_id: Ray's id of the owner's node.
    """

    def __init__(self, label: str, group_name: str, owner_id: str, node_id: str) -> None:
        self._label = label
        this = ray.get_runtime_context().current_actor
        threading.Thread(target=_keep, args=(group_name, owner_id, node_id, this), name="keeper", daemon=True).start()

    def __repr__(self) -> str:
        return self._label


_as_actor: Any = ray.remote
_KeeperActor = _as_actor(num_cpus=0, resources=_ON_THE_HEAD, max_restarts=-1)(Keeper)


def is_needed() -> bool:
    """Whether this process may end before its job does: an actor or a task, and no driver."""
    return ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def start_keeper(name: GroupName) -> Any:
    """The handle of a keeper that watches this process; make the group after it, and kill it after the group.

    It runs on the head node: any other one may be lost, and no autoscaler removes one on which an actor runs.
    """
    context = ray.get_runtime_context()
    keeper = _KeeperActor.options(
        lifetime="detached",
        namespace=_NAMESPACE,
        name=name.keeper,
        # Outside of the group that this process may be in.
        scheduling_strategy="DEFAULT",
    ).remote(name.keeper, name.group, context.get_worker_id(), context.get_node_id())
    _wait_until_accepted(keeper)
    return keeper


def _wait_until_accepted(keeper: Any) -> None:
    """Until then Ray forgets an actor whose creator dies, a detached one, too. It takes milliseconds."""
    pause = threading.Event()
    for _ in range(_MOST_LOOKS_FOR_ACCEPTANCE):
        record = ray._private.state.actors(keeper._actor_id.hex())
        if record and record["State"] != "DEPENDENCIES_UNREADY":
            return
        pause.wait(0.01)


def _keep(group_name: str, owner_id: str, node_id: str, this: Any) -> None:
    pause = threading.Event()
    was_there = False
    looks_left = _LOOKS_AFTER_THE_OWNER
    while looks_left:
        # A control service that does not answer now may do so the next time.
        with suppress(RayError):
            groups = _groups_called(group_name)
            if was_there and not groups:
                break
            was_there = was_there or bool(groups)
            if not (_is_process_alive(owner_id) and _is_node_alive(node_id)):
                # The owner's last words may still be under way.
                looks_left -= 1
                for group in groups:
                    remove_placement_group(group)
        pause.wait(_LOOK_SECONDS)
    ray.kill(this)


def _groups_called(name: str) -> list[PlacementGroup]:
    return [
        PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
        for group_id, entry in placement_group_table().items()
        if entry["name"] == name and entry["state"] != "REMOVED"
    ]


def _is_node_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _is_process_alive(worker_id: str) -> bool:
    # Private: the public state API needs a dashboard, which a local Ray does not have.
    from ray.core.generated import gcs_pb2

    accessor = ray._private.state.state._connect_and_get_accessor()  # pyright: ignore[reportPrivateUsage]
    record = accessor.get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
    return record is not None and gcs_pb2.WorkerTableData.FromString(record).is_alive  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf at run time
