"""The frameworks that the tests run on: `MISTRAL_TEST_BACKENDS=torch,flax` limits them."""

from __future__ import annotations

import os

PACKAGES = {"torch": "torch", "flax": "flax", "tf": "tensorflow"}
"""Backend -> the package that it needs."""
REQUESTED = tuple(os.environ.get("MISTRAL_TEST_BACKENDS", ",".join(PACKAGES)).split(","))
