"""The door to checkpoints: open one, load the tensors of a class from it, save one."""

from .loading import load
from .opening import Checkpoint
from .saving import save

__all__ = ["Checkpoint", "load", "save"]
