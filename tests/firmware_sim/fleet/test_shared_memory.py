"""Large arrays of another process's answers lie in memory that both have: whole, unchanged, and no more than needed."""

from __future__ import annotations

import multiprocessing
import pickle
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from firmware_sim.fleet import shared_memory
from tests.enrolments import broken_copy

LARGE = shared_memory.LEAST_BYTES


def numbered(number: int, length: int = LARGE) -> NDArray[np.uint8]:
    return np.full(length, number, np.uint8)


class Line:
    """Both sides, in this process.

    Args:
        module: with the code.
    """

    def __init__(self, module: ModuleType = shared_memory) -> None:
        self.file = module.SharedFile()
        self.writer, self.reader = module.AnswerWriter(self.file), module.AnswerReader(self.file)
        self.offsets: list[int] = []

    def crossed(self, *arrays: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """What comes of an answer."""
        self.writer.take_back(self.reader.take_done())
        data, spans = self.writer.dumps(list(arrays))
        self.offsets = [span.offset for span in spans]
        return list(self.reader.loads(data, spans))


def test_questions_come_in_order_and_whole_whether_large_or_small() -> None:
    (mine, theirs), file = multiprocessing.Pipe(), shared_memory.SharedFile()
    for question in ("a", b"b" * 3 * LARGE, ("c", b"c" * LARGE), None, b"d" * 2 * LARGE):
        shared_memory.ask(mine, file, question)
        assert shared_memory.asked(theirs, file) == question
    mine.close()
    with pytest.raises(EOFError):
        shared_memory.asked(theirs, file)


def check_a_question_longer_than_one_write_comes_whole(module: ModuleType) -> None:
    (mine, theirs), file = multiprocessing.Pipe(), module.SharedFile()
    question = np.random.default_rng(2).bytes(5 * LARGE + 7)
    module.ask(mine, file, question)
    assert module.asked(theirs, file) == question


@pytest.mark.parametrize("most", [LARGE, 5 * LARGE, 2**30])
def test_a_question_longer_than_one_write_comes_whole(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MOST_AT_ONCE", most)
    check_a_question_longer_than_one_write_comes_whole(shared_memory)


def test_writing_the_beginning_alone_is_caught() -> None:
    broken = broken_copy(
        "firmware_sim.fleet.shared_memory",
        ("MOST_AT_ONCE = 2**30", f"MOST_AT_ONCE = {LARGE}"),
        ("for start in range(0, len(view), MOST_AT_ONCE):", "for start in (0,):"),
    )
    with pytest.raises(pickle.UnpicklingError):
        check_a_question_longer_than_one_write_comes_whole(broken)


def test_a_file_is_let_go_of_once() -> None:
    file = shared_memory.SharedFile()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.close()


def test_arrays_come_as_they_were_and_are_not_written_to() -> None:
    generator = np.random.default_rng(1)
    sent = [generator.integers(0, 256, length, np.uint8) for length in (LARGE, 3 * LARGE + 1, LARGE - 1, 5, 0)]
    line = Line()
    came = line.crossed(*sent)
    assert [one.tobytes() for one in came] == [one.tobytes() for one in sent]
    assert len(line.offsets) == 2  # the small ones are sent
    for one in came[:2]:
        with pytest.raises(ValueError, match="read-only"):
            one[0] = 1


def check_what_is_referred_to_stays(module: ModuleType) -> None:
    line = Line(module)
    (first,) = line.crossed(numbered(1))
    (view,) = (one[7:] for one in line.crossed(numbered(2)))
    assert line.crossed(numbered(3))[0][0] == 3
    assert (first[0], view[0]) == (1, 2)


def test_what_is_referred_to_stays() -> None:
    check_what_is_referred_to_stays(shared_memory)
    hasty = broken_copy(
        "firmware_sim.fleet.shared_memory",
        ("weakref.finalize(view, self._done.append, span.offset).atexit = False", "self._done.append(span.offset)"),
    )
    with pytest.raises(AssertionError):
        check_what_is_referred_to_stays(hasty)


def check_a_place_is_used_again(module: ModuleType) -> None:
    line, used = Line(module), set[int]()
    for number in range(50):
        (came,) = line.crossed(numbered(number))
        assert came[-1] == number
        used.update(line.offsets)
        del came
    assert len(used) <= 2


def test_a_place_is_used_again_once_nothing_refers_to_it() -> None:
    check_a_place_is_used_again(shared_memory)
    forgetful = broken_copy(
        "firmware_sim.fleet.shared_memory", ("self._free[self._lengths[offset]].append(offset)", "pass")
    )
    with pytest.raises(AssertionError):
        check_a_place_is_used_again(forgetful)


def test_more_than_a_segment_is_held_and_what_is_larger_than_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SEGMENT_BYTES", 4 * LARGE)
    line = Line()
    sent = [
        numbered(number, length) for number, length in enumerate([3 * LARGE, 2 * LARGE, LARGE, 4 * LARGE, 5 * LARGE])
    ]
    came = line.crossed(*sent)
    assert [one.tobytes() for one in came] == [one.tobytes() for one in sent]
    assert line.offsets == [0, 4 * LARGE, 6 * LARGE, 8 * LARGE]
