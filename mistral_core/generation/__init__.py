"""How text is continued: options, one driver for every engine, and what it asks of a backend."""

from .options import IGNORED as IGNORED
from .options import GenerationConfig as GenerationConfig
