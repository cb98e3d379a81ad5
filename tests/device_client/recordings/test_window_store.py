"""Stored windows: whole after every power cut, bounded by count and age, split for good, appended at one cost."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.errors import StoreError
from device_client.ports import Float32
from device_client.recordings.window_store import SEGMENT_BYTES, Retention, WindowStore
from device_client.training import Records
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import LabelSchema

KEY = b"\x11" * 32
SHAPE = (3, 2)
DAY_S, YEAR_S, NOW_S = 86_400.0, 365 * 86_400.0, 1.8e9
CLASSES = LabelSchema("class", ("rest", "walk"))
PLENTY = Retention(1_000_000, 100 * YEAR_S)


def open_windows(flash: VirtualFlash, **changes: Any) -> WindowStore:
    given: dict[str, Any] = {
        "window_shape": SHAPE,
        "label": CLASSES,
        "retention": PLENTY,
        "held_out_fraction": 0.0,
        **changes,
    }
    return WindowStore(EncryptedFiles(flash, KEY), "default", **given)


def batch(first: int, count: int) -> tuple[Float32, NDArray[np.int32]]:
    """Windows that say their number."""
    numbers = np.arange(first, first + count)
    return np.broadcast_to(numbers[:, None, None], (count, *SHAPE)).astype(np.float32), numbers.astype(np.int32) % 2


def numbers_in(records: Records) -> list[int]:
    """Which windows these are; each whole, with its own label."""
    numbers = records.x[:, 0, 0].astype(int)
    np.testing.assert_array_equal(records.x, batch(0, 1)[0] + numbers[:, None, None])
    np.testing.assert_array_equal(records.y, numbers % 2)
    return [int(number) for number in numbers]


def add(windows: WindowStore, first: int, count: int, *, at_s: float = NOW_S) -> None:
    assert windows.append(*batch(first, count), at_s=at_s) == count


def segments(flash: VirtualFlash) -> list[str]:
    return list(flash.names("recordings/"))


def test_what_is_stored_is_there_in_order_for_the_next_process(tmp_path: Path) -> None:
    store = EncryptedFiles.in_folder(tmp_path / "store", KEY)
    fitting: dict[str, Any] = {"window_shape": SHAPE, "label": CLASSES, "retention": PLENTY, "held_out_fraction": 0.0}
    windows = WindowStore(store, "wrist", **fitting)
    add(windows, 0, 3)
    add(windows, 3, 1)
    assert (len(windows), windows.appended, numbers_in(windows.training())) == (4, 4, [0, 1, 2, 3])
    store.close()
    again = WindowStore(EncryptedFiles.in_folder(tmp_path / "store", KEY), "wrist", **fitting)
    add(again, 4, 2)
    assert (len(again), again.appended, numbers_in(again.training())) == (6, 6, [0, 1, 2, 3, 4, 5])
    assert again.training().x.dtype == np.float32
    assert again.training().y.dtype == np.int32


def test_an_empty_store_has_no_records() -> None:
    windows = open_windows(VirtualFlash())
    assert (len(windows), windows.appended, windows.prune(NOW_S)) == (0, 0, 0)
    assert windows.training().x.shape == (0, *SHAPE)
    assert windows.append(*batch(0, 0), at_s=NOW_S) == 0
    assert windows.appended == 0


def test_labels_that_are_numbers_come_back() -> None:
    flash, label = VirtualFlash(), LabelSchema("value", ("rate", "trend"), ("1/min", "1"))
    y = np.arange(8, dtype=np.float32).reshape(4, 2)
    open_windows(flash, label=label).append(batch(0, 4)[0], y, at_s=NOW_S)
    np.testing.assert_array_equal(open_windows(flash, label=label).training().y, y)


def test_nothing_of_a_window_can_be_read_on_the_medium() -> None:
    flash = VirtualFlash()
    add(open_windows(flash), 1000, 50)
    assert batch(1001, 1)[0].tobytes() not in b"".join(flash.durable().values())


BAD = {
    "shape": ((np.zeros((2, 4, 2)), np.zeros(2, np.int32)), r"the windows are \(4, 2\), the model takes \(3, 2\)"),
    "not finite": ((np.full((2, 3, 2), np.nan), np.zeros(2, np.int32)), "not finite"),
    "infinite": ((np.full((2, 3, 2), np.inf), np.zeros(2, np.int32)), "not finite"),
    "too large": ((np.full((2, 3, 2), 1e300), np.zeros(2, np.int32)), "not finite"),
    "class too high": ((np.zeros((2, 3, 2)), np.array([0, 2])), "the labels run from 0 to 2"),
    "class too high for int32": ((np.zeros((2, 3, 2)), np.array([0, 2**32])), "the labels run from 0"),
    "class negative": ((np.zeros((2, 3, 2)), np.array([-1, 0])), "the labels run from -1"),
    "too few labels": ((np.zeros((2, 3, 2)), np.zeros(1, np.int32)), r"the model takes int32 \(2,\)"),
    "numbers for classes": ((np.zeros((2, 3, 2)), np.zeros(2)), r"the labels are float64"),
    "columns for classes": ((np.zeros((2, 3, 2)), np.zeros((2, 1), np.int32)), r"the model takes int32 \(2,\)"),
}


@pytest.mark.parametrize(("given", "reason"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(given: Any, reason: str) -> None:
    flash = VirtualFlash()
    windows = open_windows(flash)
    before = flash.operations
    with pytest.raises(StoreError, match=reason):
        windows.append(*given, at_s=NOW_S)
    assert flash.operations == before
    assert windows.appended == 0


def test_number_labels_that_do_not_fit_are_refused() -> None:
    windows = open_windows(VirtualFlash(), label=LabelSchema("binary", ("a", "b")))
    for y, reason in (
        (np.zeros((1, 3), np.float32), r"takes float32 \(1, 2\)"),
        (np.zeros(1, np.int32), r"takes float32 \(1, 2\)"),
        (np.full((1, 2), np.nan), "not finite"),
        (np.full((1, 2), 0.5), "other than 0 and 1"),
    ):
        with pytest.raises(StoreError, match=reason):
            windows.append(batch(0, 1)[0], y, at_s=NOW_S)


@pytest.mark.parametrize("time_s", [float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(time_s: float) -> None:
    windows = open_windows(VirtualFlash())
    with pytest.raises(StoreError, match="Unix seconds"):
        windows.append(*batch(0, 1), at_s=time_s)
    with pytest.raises(StoreError, match="Unix seconds"):
        windows.prune(time_s)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_shape": (6,)}, r"the windows are \(3, 2\), the model takes \(6,\)"),
        ({"label": LabelSchema("value", ("rate",), ("1/min",))}, "a label is a class, the model takes 1 numbers"),
        ({"label": LabelSchema("class", ("rest",))}, "the labels run from 0 to 1, the model knows 0 to 0"),
    ],
)
def test_recordings_of_another_model_are_refused_and_kept(changes: dict[str, Any], reason: str) -> None:
    flash = VirtualFlash()
    add(open_windows(flash), 0, 4)
    with pytest.raises(StoreError, match=f"another model's: {reason}"):
        open_windows(flash, **changes)
    assert len(open_windows(flash)) == 4


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(LocalMisuseError, match="held_out_fraction"):
        open_windows(VirtualFlash(), held_out_fraction=fraction)


def test_a_record_stays_on_its_side_whatever_goes_and_comes() -> None:
    flash = VirtualFlash()
    windows = open_windows(flash, held_out_fraction=0.3)
    for first in range(0, 400, 8):
        add(windows, first, 8)
    kept_out, trained_on = numbers_in(windows.held_out()), numbers_in(windows.training())
    assert sorted(kept_out + trained_on) == list(range(400))
    assert 70 <= len(kept_out) <= 170  # binomial(400, 0.3): outside by chance once in 10^7
    bounded = open_windows(flash, held_out_fraction=0.3, retention=Retention(150, 100 * YEAR_S))
    add(bounded, 400, 40)
    assert numbers_in(bounded.held_out()) == [*(n for n in kept_out if n >= 290), *new_of(bounded.held_out(), 400)]
    assert numbers_in(bounded.training()) == [*(n for n in trained_on if n >= 290), *new_of(bounded.training(), 400)]


def new_of(records: Records, first: int) -> list[int]:
    return [number for number in numbers_in(records) if number >= first]


def test_a_changed_fraction_moves_records_one_way_only() -> None:
    flash = VirtualFlash()
    add(open_windows(flash), 0, 300)
    sides = [
        set(numbers_in(open_windows(flash, held_out_fraction=fraction).held_out())) for fraction in (0, 0.1, 0.2, 0.6)
    ]
    assert sides[0] == set()
    assert sides[0] < sides[1] < sides[2] < sides[3]


def test_the_count_holds_exactly_and_the_medium_is_bounded() -> None:
    flash = VirtualFlash()
    windows = open_windows(flash, retention=Retention(100, 100 * YEAR_S))
    for first in range(0, 2000, 5):
        add(windows, first, 5)
        assert len(windows) == min(first + 5, 100)
    assert numbers_in(windows.training()) == list(range(1900, 2000))
    assert windows.appended == 2000
    stored = sum(len(EncryptedFiles(flash, KEY).frames(name)) * 5 for name in segments(flash))
    assert stored <= 100 + 2 * (100 // 8)
    again = open_windows(flash, retention=Retention(100, 100 * YEAR_S))
    assert (numbers_in(again.training()), again.appended) == (list(range(1900, 2000)), 2000)


def test_old_records_go_from_the_medium_too() -> None:
    flash = VirtualFlash()
    retention = Retention(1000, 30 * DAY_S)
    windows = open_windows(flash, retention=retention)
    for day in range(60):
        add(windows, day, 1, at_s=NOW_S + day * DAY_S)
        windows.prune(NOW_S + day * DAY_S)
    assert numbers_in(windows.training()) == list(range(29, 60))
    assert windows.prune(NOW_S + 61 * DAY_S) == 2
    assert windows.prune(NOW_S + 61 * DAY_S) == 0
    again = open_windows(flash, retention=retention)
    assert numbers_in(again.training()) == list(range(31, 60))
    for day in range(62, 100):
        again.prune(NOW_S + day * DAY_S)
    assert (len(again), again.appended) == (0, 60)
    assert len(segments(flash)) == 1
    assert (flash.size(segments(flash)[0]) or 0) < 4096
    assert open_windows(flash, retention=retention).appended == 60


@pytest.mark.parametrize("jump_s", [10 * YEAR_S, -10 * YEAR_S])
def test_a_clock_that_jumps_ten_years_erases_nothing_and_keeps_nothing_for_ever(jump_s: float) -> None:
    flash, retention = VirtualFlash(), Retention(1000, 30 * DAY_S)
    windows = open_windows(flash, retention=retention)
    add(windows, 0, 5)
    assert windows.prune(NOW_S + jump_s) == 0
    add(windows, 5, 5, at_s=NOW_S + jump_s)
    windows = open_windows(flash, retention=retention)
    assert windows.prune(NOW_S + 60) == 0
    assert len(windows) == 10
    for day in range(1, 32):
        windows = open_windows(flash, retention=retention)
        windows.prune(NOW_S + day * DAY_S)
    assert len(windows) == 0


def test_appending_costs_the_same_with_ten_records_and_with_five_thousand() -> None:
    flash = VirtualFlash()
    windows = open_windows(flash)
    costs = []
    for first in range(5100):
        before = flash.operations, flash.written_bytes
        add(windows, first, 1)
        costs.append((flash.operations - before[0], flash.written_bytes - before[1]))
    early, late = costs[10:20], costs[5000:5010]
    assert {operations for operations, _ in late} == {operations for operations, _ in early} == {2}
    # The frame's number and the count of records take a few bytes more.
    assert max(size for _, size in late) <= min(size for _, size in early) + 8
    assert max(operations for operations, _ in costs[1:]) <= 3
    assert len(segments(flash)) == -(-5100 // 256)


def test_a_large_batch_is_a_few_frames() -> None:
    flash = VirtualFlash()
    windows = open_windows(flash, window_shape=(1000, 6))
    x = np.random.default_rng(0).normal(size=(200, 1000, 6)).astype(np.float32)
    before = flash.operations
    windows.append(x, np.zeros(200, np.int32), at_s=NOW_S)
    frames = -(-x.nbytes // SEGMENT_BYTES)
    assert flash.operations - before <= 3 * (frames + 2)
    np.testing.assert_array_equal(open_windows(flash, window_shape=(1000, 6)).training().x, x)


def test_a_disk_that_fills_up_keeps_what_was_stored_and_says_how_many() -> None:
    flash = VirtualFlash(capacity_bytes=3_000_000)
    windows = open_windows(flash, window_shape=(1000, 6))
    with pytest.raises(StoreError, match=r"only the first \d+ of 200 windows were stored.*No space left") as raised:
        windows.append(np.ones((200, 1000, 6), np.float32), np.zeros(200, np.int32), at_s=NOW_S)
    assert f"first {windows.appended} of" in str(raised.value)
    assert len(open_windows(flash, window_shape=(1000, 6)).training()) == windows.appended > 0


def test_a_full_disk_is_made_room_on_by_pruning() -> None:
    flash, retention = VirtualFlash(), Retention(1000, 10 * DAY_S)
    windows = open_windows(flash, retention=retention)
    for day in range(9):
        add(windows, day, 20, at_s=NOW_S + day * DAY_S)
    flash.capacity_bytes = sum(flash.size(name) or 0 for name in flash.names())
    with pytest.raises(StoreError, match="No space left"):
        windows.append(*batch(12, 1), at_s=NOW_S + 9 * DAY_S)
    windows.prune(NOW_S + 15 * DAY_S)
    add(windows, 12, 1, at_s=NOW_S + 15 * DAY_S)


def with_segments(count: int) -> VirtualFlash:
    """Ten records in each of `count` segments."""
    flash = VirtualFlash()
    windows = open_windows(flash, retention=Retention(1000, 16 * DAY_S))
    for number in range(count):
        for half in (0, 5):
            add(windows, 10 * number + half, 5, at_s=NOW_S + 2 * number * DAY_S)
    assert len(segments(flash)) == count
    return flash


def flip(flash: VirtualFlash, name: str, position: int) -> None:
    flash.write_at(name, position, bytes([flash.read_at(name, position, 1)[0] ^ 1]))


def check_damage_is_named_and_the_rest_is_whole(flash: VirtualFlash, name: str, left: list[int]) -> None:
    bare = name.removeprefix("recordings/")
    with pytest.raises(StoreError, match=rf"damaged or incomplete in {name}, now set aside as damaged/{bare}"):
        open_windows(flash)
    windows = open_windows(flash)
    assert numbers_in(windows.training()) == left
    add(windows, 70, 2)
    assert numbers_in(open_windows(flash).training()) == [*left, 70, 71]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 5, 17, 40])
def test_a_damaged_segment_is_named_and_set_aside(number: int, position: int) -> None:
    flash = with_segments(3)
    name = segments(flash)[number]
    flip(flash, name, position)
    left = [record for record in range(30) if record // 10 != number]
    check_damage_is_named_and_the_rest_is_whole(flash, name, left)
    assert flash.size(name.replace("recordings", "damaged"))


def test_a_segment_that_lost_its_end_is_named() -> None:
    flash = with_segments(3)
    name = segments(flash)[1]
    flash.truncate(name, (flash.size(name) or 0) - 1)
    check_damage_is_named_and_the_rest_is_whole(flash, name, [*range(10), *range(20, 30)])


def test_a_missing_segment_is_named() -> None:
    flash = with_segments(3)
    name = segments(flash)[1]
    flash.remove(name)
    check_damage_is_named_and_the_rest_is_whole(flash, name, [*range(10), *range(20, 30)])


def test_several_damaged_segments_are_set_aside_at_once() -> None:
    flash = with_segments(5)
    for number in (1, 2, 4):
        flip(flash, segments(flash)[number], 17)
    with pytest.raises(StoreError, match=r"00000002, recordings/default.00000003, recordings/default.00000005"):
        open_windows(flash)
    assert numbers_in(open_windows(flash).training()) == [*range(10), *range(30, 40)]


def test_exchanged_segments_are_noticed() -> None:
    flash = with_segments(3)
    one, two = segments(flash)[:2]
    first, second = flash.read(one) or b"", flash.read(two) or b""
    flash.write(one, second)
    flash.write(two, first)
    with pytest.raises(StoreError, match="damaged"):
        open_windows(flash)
    assert numbers_in(open_windows(flash).training()) == list(range(20, 30))


def test_damage_under_a_running_device_is_named_and_it_goes_on() -> None:
    flash = with_segments(3)
    windows = open_windows(flash)
    flip(flash, segments(flash)[1], 17)
    with pytest.raises(StoreError, match="00000002, now set aside"):
        windows.training()
    assert numbers_in(windows.training()) == [*range(10), *range(20, 30)]
    add(windows, 30, 1)
    assert numbers_in(open_windows(flash).training()) == [*range(10), *range(20, 31)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_segment_that_vanishes_under_a_running_device_is_named_and_it_goes_on(number: int) -> None:
    flash = with_segments(3)
    windows = open_windows(flash)
    flash.remove(segments(flash)[number])
    with pytest.raises(StoreError, match=f"0000000{number + 1}, now set aside"):
        windows.training()
    left = [window for window in range(30) if window // 10 != number]
    assert numbers_in(windows.training()) == left
    add(windows, 30, 1)
    assert numbers_in(windows.training()) == [*left, 30]
    assert numbers_in(open_windows(flash).training()) == [*left, 30]


def test_the_only_segment_may_vanish() -> None:
    flash = with_segments(1)
    windows = open_windows(flash)
    flash.remove(segments(flash)[0])
    with pytest.raises(StoreError, match="00000001, now set aside"):
        windows.held_out()
    assert len(windows.training()) == 0
    windows.prune(NOW_S)
    add(windows, 30, 1)
    assert numbers_in(open_windows(flash).training()) == [30]


def test_a_segment_that_the_medium_cannot_read_any_more_is_set_aside() -> None:
    class WornFlash(VirtualFlash):
        def read(self, name: str) -> bytes | None:
            if name == "recordings/default.00000002":
                raise OSError(5, "Input/output error")
            return super().read(name)

    flash = with_segments(3)
    flash.__class__ = WornFlash
    with pytest.raises(StoreError, match="00000002, now set aside"):
        open_windows(flash)
    assert numbers_in(open_windows(flash).training()) == [*range(10), *range(20, 30)]


def test_a_segment_set_aside_cannot_be_put_back_in_place_of_a_new_one() -> None:
    flash = with_segments(3)
    last = segments(flash)[2]
    genuine = flash.read(last) or b""
    flip(flash, last, 17)
    with pytest.raises(StoreError):
        open_windows(flash)
    add(open_windows(flash, retention=Retention(1000, 16 * DAY_S)), 50, 1, at_s=NOW_S + 7 * DAY_S)
    assert len(segments(flash)) == 3
    flash.write(last, genuine)
    with pytest.raises(StoreError, match="damaged or incomplete"):
        open_windows(flash)


def test_segments_set_aside_go_when_their_time_has_come() -> None:
    flash = with_segments(3)
    flip(flash, segments(flash)[0], 17)
    with pytest.raises(StoreError):
        open_windows(flash)
    assert flash.names("damaged/")
    windows = open_windows(flash, retention=Retention(5, 100 * YEAR_S))
    windows.prune(NOW_S)
    assert not flash.names("damaged/")


def test_another_key_sets_nothing_aside() -> None:
    flash = with_segments(2)
    before = flash.durable()
    with pytest.raises(StoreError, match="another one"):
        WindowStore(
            EncryptedFiles(flash, b"\x12" * 32),
            "default",
            window_shape=SHAPE,
            label=CLASSES,
            retention=PLENTY,
            held_out_fraction=0.0,
        )
    assert flash.durable() == before


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_garbage_in_a_segment_never_comes_out_as_a_record(seed: int) -> None:
    random = Random(seed)  # noqa: S311 - a test's variety
    flash = with_segments(3)
    name = segments(flash)[random.randrange(3)]
    size = flash.size(name) or 0
    start = random.randrange(size)
    flash.write_at(name, start, random.randbytes(random.randint(1, size)))
    try:
        windows = open_windows(flash)
    except StoreError:
        windows = open_windows(flash)
    found = numbers_in(windows.training())
    assert found == sorted(set(found))
    assert set(range(30)) - set(found) <= set(range(10 * (int(name[-1]) - 1), 10 * int(name[-1])))
