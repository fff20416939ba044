"""How does one rank load? Plan, storage, stream, exchange and device put together; no Ray, no other node."""
