"""The configuration: pydantic models, loading and checking. Imports no torch."""

from gkd.config.load import dump_config, load_config, parse_config
from gkd.config.schema import Config

__all__ = ["Config", "dump_config", "load_config", "parse_config"]
