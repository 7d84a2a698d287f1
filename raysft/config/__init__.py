"""Configuration: `schema` holds the tree, `load` reads it, `describe` prints it."""

from raysft.config.load import changed_keys, load_config, to_tree, to_yaml
from raysft.config.schema import Config

__all__ = ["Config", "changed_keys", "load_config", "to_tree", "to_yaml"]
