"""What the tests of conversion share."""

import os

import pytest


@pytest.fixture(autouse=True)
def nothing_waits_for_the_disk(monkeypatch):
    """A test that is killed by no power cut need not sync; tests/core/test_files.py sees to it that it is done."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
