"""When may a read start, and who holds its memory? Threads that fill slots of a fixed arena, in plan order."""
