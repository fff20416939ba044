"""How do neighbours see a block? Sockets carry numbers, shared memory carries bytes; one node, no names on disk."""
