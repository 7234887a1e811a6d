"""The `backend` fixture: a test that asks for it runs on every backend.

`MISTRAL_TEST_BACKENDS=torch,flax` limits them; one that is asked for and missing fails exactly one test.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal

import pytest
from frameworks import PACKAGES, REQUESTED, leave_further
from sharing import begin_with_the_longest, group

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    group(items, root=config.rootpath)
    leave_further(items, of_whole_files=not any("::" in argument for argument in config.args))
    yield
    if hasattr(config, "workerinput"):  # of pytest-xdist
        begin_with_the_longest(items)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """SIGINT as in a terminal, here and in the processes that tests start: a shell's background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", params=REQUESTED)
def backend(request):
    """The package of a backend: mistral_torch, mistral_flax or mistral_tf."""
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    return importlib.import_module(f"mistral_{request.param}")
