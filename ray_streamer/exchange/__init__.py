"""How do ranks of a node use blocks that another of them reads? Sockets carry numbers, shared memory carries bytes; one node, no names on disk."""
