"""Fixtures that several rooms' tests use, and the mark of tests that are not run again on the newest releases."""

from __future__ import annotations

import pytest

from tests.contracts.databases import database, database_url, postgresql_server
from tests.ids import LONGEST_ID, short_id
from tests.once import runs_once

__all__ = ["database", "database_url", "postgresql_server"]


def pytest_make_parametrize_id(val: object) -> str | None:
    """A short name for long texts and bytes; None leaves it to pytest."""
    is_long = isinstance(val, str | bytes) and len(val) > LONGEST_ID
    return short_id(val) if is_long else None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.nodeid.partition("::")[0]
        if runs_once(file, getattr(item, "originalname", None) or item.name):
            item.add_marker(pytest.mark.once)
