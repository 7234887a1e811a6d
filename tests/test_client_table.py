"""docs/clients.md says what was run and nothing else."""

from __future__ import annotations

import client_table


def test_the_table_is_made_of_the_tests():
    assert client_table.on_the_page() == client_table.table(), "python tests/client_table.py --write"


def test_every_client_has_a_version():
    assert all(version for _, version, *_ in client_table.rows())
    assert len({client for client, *_ in client_table.rows()}) > 5
