"""Which reads, by whom, and where does each byte go? Pure and vectorised; nothing here does I/O."""
