"""Chance that follows from a key and labels alone."""

from __future__ import annotations

from itertools import product

from firmware_sim.labelled_chance import bits, key_of, uniform


def test_numbers_are_the_same_on_every_machine() -> None:
    assert key_of("fleet", "radio", "watch-1") == 13941225490219991920
    assert bits(7, 1, 2) == 5375718071520651535


def test_every_label_counts_in_its_place() -> None:
    drawn = [bits(1, *labels) for count in range(4) for labels in product((-1, 0, 1), repeat=count)]
    assert len(set(drawn)) == len(drawn)
    assert key_of(1, "a", "b") != key_of(1, "ab")


def test_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = [uniform(key_of(1, str(key)), label) for key in range(100) for label in range(100)]
    counts = [0] * 10
    for number in numbers:
        counts[int(10 * number)] += 1
    # Chi-squared with 9 degrees of freedom exceeds 62 with a probability of 6e-10.
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 62
