"""Where does a rank run? Node, process, and what its machine has for it; see `ray_streamer.machine`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Where one rank runs.

    Attributes:
        node_id: Ray's node id, hexadecimal.
        node_ip: Address of the node.
        hostname: Name of the machine.
        pid: Process id of the actor on that machine.
        process_start: When that process started, as its kernel counts; tells it from others of that number. None where there is no
            /proc.
        available_memory_bytes: Memory that the process could still take.
    """

    node_id: str
    node_ip: str
    hostname: str
    pid: int
    process_start: str | None
    available_memory_bytes: int

    @property
    def node(self) -> str:
        """The node as messages name it."""
        return name_of_node(self.hostname, self.node_ip, self.node_id)


def name_of_node(hostname: str, address: str, node_id: str) -> str:
    """A node as messages name it; Ray's id tells nodes of one machine apart.

    >>> name_of_node("worker-3", "10.0.0.7", "5c1d09abffff")
    'worker-3 (10.0.0.7, 5c1d09ab)'
    """
    return f"{hostname} ({address}, {node_id[:8]})"
