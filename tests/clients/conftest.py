"""What needs a client that the development environment has not is collected where it is: by `make clients`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import client_table
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """A client in another version than the pinned one would make the table false."""
    pinned = client_table.versions()
    for client in {marker.args[0] for item in items for marker in item.iter_markers("client")}:
        found = importlib.metadata.version(client)
        if found != pinned[client]:
            raise pytest.UsageError(f"{client} {found} is installed, {pinned[client]} is pinned")


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A checkpoint with its tokenizer, as `save_pretrained` writes it."""
    import mistral_torch
    from mistral_core.data import TINY_CHECKPOINT

    directory = tmp_path_factory.mktemp("checkpoint")
    model = mistral_torch.AutoModelForCausalLM.from_pretrained(TINY_CHECKPOINT, dtype="float32")
    model.generation_config = mistral_torch.GenerationConfig.from_model_config(model.config)
    model.save_pretrained(directory)
    mistral_torch.AutoTokenizer.from_pretrained(TINY_CHECKPOINT).save_pretrained(directory)
    return directory


@pytest.fixture
def model(path):
    import mistral_torch

    return mistral_torch.AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def tokenizer(path):
    import mistral_torch

    return mistral_torch.AutoTokenizer.from_pretrained(path)


@pytest.fixture
def their_tokenizer(path):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture
def their_model(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
