"""How do programs that were written for other loaders run through this package? By another import, and nothing else."""
