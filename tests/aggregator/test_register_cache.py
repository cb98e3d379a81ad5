"""Who is registered, as of a moment ago: few questions to the database, and a bound on what is remembered."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from aggregator import register_cache
from aggregator.errors import DatabaseError
from aggregator.register_cache import KNOWN_FOR_S, UNKNOWN_FOR_S, RegisterCache
from aggregator.store.devices import RegisteredKey


class Register:
    """A register that tells what it was asked."""

    def __init__(self, **known: RegisteredKey) -> None:
        self.known, self.asked = known, list[set[str]]()

    def find(self, names: Iterable[str]) -> dict[str, RegisteredKey]:
        self.asked.append(set(names))
        return {name: self.known[name] for name in self.asked[-1] if name in self.known}


def cache_of(register: Register) -> RegisterCache:
    return RegisterCache(register)  # type: ignore[arg-type]


def test_all_names_of_a_batch_are_one_question_and_then_none() -> None:
    register = Register(a=RegisteredKey(bytes(32)), b=RegisteredKey(bytes(32)))
    cache = cache_of(register)
    cache.look_up({"a", "b", "c"}, 0.0)
    cache.look_up({"a", "c"}, 1.0)
    assert register.asked == [{"a", "b", "c"}]
    assert [cache.is_registered(name, 0.0) for name in "abcd"] == [True, True, False, False]


def test_what_is_known_is_asked_again_after_a_while_and_what_is_not_soon() -> None:
    register = Register(a=RegisteredKey(bytes(32)))
    cache = cache_of(register)
    cache.look_up({"a", "b"}, 0.0)
    register.known["b"] = RegisteredKey(bytes(32))
    cache.look_up({"a", "b"}, UNKNOWN_FOR_S)
    assert register.asked[1:] == [{"b"}]
    assert cache.is_registered("b", UNKNOWN_FOR_S)
    del register.known["a"]
    cache.look_up({"a"}, KNOWN_FOR_S)
    assert not cache.is_registered("a", KNOWN_FOR_S)


def test_a_name_that_would_be_looked_up_anyway_is_forgotten() -> None:
    cache = cache_of(Register(a=RegisteredKey(bytes(32)), b=RegisteredKey(bytes(32))))
    cache.look_up({"a", "stranger"}, 0.0)
    cache.look_up({"b"}, 1.0)
    cache.forget(KNOWN_FOR_S - 0.1)
    assert set(cache._known) == {"a", "b", "stranger"}
    cache.forget(KNOWN_FOR_S + 0.9)
    assert set(cache._known) == {"b"}


def test_a_clock_that_was_set_back_asks_anew() -> None:
    register = Register(a=RegisteredKey(bytes(32)))
    cache = cache_of(register)
    cache.look_up({"a"}, 1e6)
    cache.look_up({"a"}, 0.0)
    assert len(register.asked) == 2


def test_a_name_is_good_in_its_time_alone() -> None:
    cache = cache_of(Register(a=RegisteredKey(bytes(32), 10.0, 20.0)))
    cache.look_up({"a"}, 5.0)
    assert [cache.is_registered("a", at_s) for at_s in (9.9, 10.0, 20.0, 20.1)] == [False, True, True, False]


def test_a_flood_of_names_is_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_cache, "MOST_NAMES", 100)
    cache = cache_of(Register(a=RegisteredKey(bytes(32))))
    cache.look_up({"a"}, 0.0)
    for number in range(250):
        cache.look_up({f"stranger-{number}"}, 0.0)
        assert len(cache._known) <= 100
    assert "a" not in cache._known
    assert "stranger-249" in cache._known
    cache.look_up({"a"}, 0.0)
    assert cache.is_registered("a", 0.0)


def test_a_failing_database_leaves_nothing_half_known() -> None:
    register = Register(a=RegisteredKey(bytes(32)))
    cache = cache_of(register)

    def fail(_names: Iterable[str]) -> dict[str, RegisteredKey]:
        raise DatabaseError("gone")

    find, register.find = register.find, fail  # type: ignore[method-assign]
    with pytest.raises(DatabaseError):
        cache.look_up({"a"}, 0.0)
    register.find = find  # type: ignore[method-assign]
    cache.look_up({"a"}, 0.0)
    assert cache.is_registered("a", 0.0)
