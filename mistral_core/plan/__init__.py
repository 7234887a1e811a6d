"""What a model needs on devices that are not here: bytes of each, and what they send each other, by arithmetic alone.

from mistral_core import PRESETS
from mistral_core.plan import memory_of, plan, suggest

plan(PRESETS["mistral-7b-v0.3"], {"fsdp": 4, "tensor": 2}, optimizer="adamw").total
suggest(PRESETS["mistral-7b-v0.3"], memory_of("h100"), optimizer="adamw").mesh
"""

from .collectives import Collective as Collective
from .devices import DEVICES as DEVICES
from .devices import fits as fits
from .devices import memory_of as memory_of
from .devices import suggest as suggest
from .memory import Plan as Plan
from .memory import plan as plan
from .workload import Workload as Workload
from .workload import mesh_of as mesh_of
