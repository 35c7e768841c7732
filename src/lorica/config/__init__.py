"""Run settings: what can be set, where each value came from, YAML in and the same YAML out.

settings.py   the models TrainSettings and RunConfig, with the help and the range of every setting
names.py      other tools' names for the same settings, and hints for those without a counterpart
words.py      what a setting expects and what is wrong with a value, in words
text.py       YAML and command-line text -> values
resolve.py    several layers of settings -> one Resolved, every problem in one error
"""

from lorica.config.names import ALIASES
from lorica.config.resolve import Layer, Resolved, json_schema, resolve
from lorica.config.settings import Preset, RunConfig, Setting, TrainSettings, known_settings
from lorica.config.text import flag_layer, load_yaml, parse_flag, parse_yaml

__all__ = [
    "ALIASES",
    "Layer",
    "Preset",
    "Resolved",
    "RunConfig",
    "Setting",
    "TrainSettings",
    "flag_layer",
    "json_schema",
    "known_settings",
    "load_yaml",
    "parse_flag",
    "parse_yaml",
    "resolve",
]
