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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The tests of a file go to one process, for what the first of them makes is there for the others."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(config.rootpath).as_posix()))
    leave_further(items, of_whole_files=not any("::" in argument for argument in config.args))


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
