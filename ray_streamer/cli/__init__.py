"""How does a person or a script use it from a shell? One module per command; figures go to stdout, all else to stderr."""

from ray_streamer.cli.main import main

__all__ = ["main"]
