"""How does one rank load? Plan, storage, staging, exchange and device put together; no Ray, no other node."""
