"""How do the small files of a checkpoint come to this machine's disk? Config, tokenizer and code, which engines read as files.

selection   which files are meant?
pull        copies into a folder, each one complete or absent
cache       one copy for each node, for as long as the files stay the same
"""

from ray_streamer.files.cache import cached_files
from ray_streamer.files.known import listed_or_known
from ray_streamer.files.pull import pull_files
from ray_streamer.files.selection import ENGINE_FILES, Selection

__all__ = ["ENGINE_FILES", "Selection", "cached_files", "listed_or_known", "pull_files"]
