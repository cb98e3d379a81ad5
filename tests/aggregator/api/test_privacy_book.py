"""Accounts of privacy: one task's does not keep another's waiting, and each is made once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.api.privacy_book import PrivacyBook
from tests.aggregator.api.seeded_study import MASKED, OPEN, SeededStudy
from tests.enrolments import broken_copy

LONG_S = 30.0


def check_nobody_waits_for_another_task(folder: Path, kind: type[PrivacyBook], *, patience_s: float = LONG_S) -> None:
    """While the masked task is being accounted for, the open one's account is given."""
    begun, over = threading.Event(), threading.Event()

    class Slow(kind):  # type: ignore[misc,valid-type]
        def _account(self, task: str, *arguments: object, **options: object) -> object:
            if task == MASKED:
                begun.set()
                assert over.wait(LONG_S)
            return super()._account(task, *arguments, **options)

    study = SeededStudy(f"sqlite:///{folder / 'study.db'}", rounds=2, masked_rounds=2)
    with closing(study.store), ThreadPoolExecutor(2) as pool:
        book = Slow(study.store)
        slow = pool.submit(book.spent, MASKED)
        try:
            assert begun.wait(LONG_S)
            assert pool.submit(book.spent, OPEN).result(patience_s).task == OPEN
        finally:
            over.set()
        assert slow.result(LONG_S).task == MASKED


def test_nobody_waits_for_the_account_of_another_task(tmp_path: Path) -> None:
    check_nobody_waits_for_another_task(tmp_path, PrivacyBook)


def test_a_book_with_one_lock_for_all_tasks_is_caught(tmp_path: Path) -> None:
    broken = broken_copy("aggregator.api.privacy_book", ("self._accounting[task]", "self._accounting['']"))
    with pytest.raises(TimeoutError):
        check_nobody_waits_for_another_task(tmp_path, broken.PrivacyBook, patience_s=0.3)


def test_whoever_asks_at_once_gets_one_account(tmp_path: Path) -> None:
    counted = []

    class Counting(PrivacyBook):
        def _account(self, task: str, *arguments: object, **options: object) -> object:  # type: ignore[override]
            counted.append(task)
            return super()._account(task, *arguments, **options)  # type: ignore[arg-type]

    study = SeededStudy(f"sqlite:///{tmp_path / 'study.db'}", rounds=2, masked_rounds=2)
    with closing(study.store), ThreadPoolExecutor(8) as pool:
        book = Counting(study.store)
        found = list(pool.map(book.spent, [MASKED] * 8))
    assert counted == [MASKED]
    assert len({id(one) for one in found}) == 1
