"""Which knobs are there, what are their defaults, and where does a value come from?

load        knobs of every load
stores      knobs of single stores
runai       variables of Run:ai's streamer that mean the same
sources     all of them as one value, from arguments and the environment
"""

from ray_streamer.settings.load import ENV_PREFIX, MIB
from ray_streamer.settings.runai import ALIASES
from ray_streamer.settings.sources import REPLACE_RUNAI, SECRET_SETTINGS, Settings, replaces_runai

__all__ = ["ALIASES", "ENV_PREFIX", "MIB", "REPLACE_RUNAI", "SECRET_SETTINGS", "Settings", "replaces_runai"]
