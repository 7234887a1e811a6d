"""What a Mistral is: one checked description, every dialect of config file, published sizes, rotary frequencies."""

from .config import CONFIG_FILES as CONFIG_FILES
from .config import MistralConfig as MistralConfig
from .config import read_fields as read_fields
from .named import Ministral3Config as Ministral3Config
from .named import MinistralConfig as MinistralConfig
from .view import AssignableConfig as AssignableConfig
