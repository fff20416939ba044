"""What do tests, examples and benchmarks need that a user does not? Real servers, faults and checkpoints."""
