"""What the tests of the public API share, importable by the processes that they start: an oracle, and processes."""
