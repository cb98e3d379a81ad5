"""The virtual flash loses what a real one may lose, and no more; the durable functions survive all of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Literal, get_args

import pytest

from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.durable import Disk, append_durably, clear_leftovers, remove_durably, write_atomic

OLD, NEW = b"old" * 3000, b"newer" * 3000
Moment = Literal["before", "during", "after"]


def flash_with(**files: bytes) -> VirtualFlash:
    """A flash on which everything is synced."""
    flash = VirtualFlash()
    for name, data in files.items():
        flash.write(name, data)
        flash.sync(name)
    flash.sync_folder()
    return flash


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311 - chance, not secrecy


def outcomes(flash: VirtualFlash, count: int = 40) -> Iterator[VirtualFlash]:
    for seed in range(count):
        yield flash.after_power_cut(seeded(seed))


def every_cut(make: Callable[[], VirtualFlash], act: Callable[[VirtualFlash], None]) -> Iterator[VirtualFlash]:
    """What may be found after the power went at each boundary of `act`."""
    whole = make()
    start = whole.operations
    act(whole)
    for at in range(start, whole.operations):
        for moment in get_args(Moment):
            flash = make()
            flash.power_cut = PowerCut(at, moment)
            with pytest.raises(PowerCutError):
                act(flash)
            yield from outcomes(flash, 15)


def test_what_was_synced_stays() -> None:
    flash = flash_with(a=OLD)
    flash.append("a", b"more")
    for after in outcomes(flash):
        content = after.read("a")
        assert content is not None
        assert content[: len(OLD)] == OLD


def test_what_was_not_synced_may_be_there_or_not_or_torn_or_garbage() -> None:
    flash = flash_with(a=b"old")
    flash.append("a", NEW)
    found = [after.read("a") for after in outcomes(flash, 100)]
    assert b"old" in found
    assert b"old" + NEW in found
    torn = [data for data in found if data is not None and data not in (b"old", b"old" + NEW)]
    assert any((b"old" + NEW).startswith(data) for data in torn)
    assert any(not (b"old" + NEW).startswith(data) for data in torn)


def test_an_overwrite_in_place_may_be_torn_only_where_it_was() -> None:
    flash = flash_with(a=OLD)
    flash.write_at("a", 100, b"x" * 200)
    found = [after.read("a") or b"" for after in outcomes(flash, 100)]
    assert all(data[:100] == OLD[:100] and data[300:] == OLD[300:] for data in found)
    assert len({data[100:300] for data in found}) > 10


def test_a_new_name_without_a_synced_folder_may_be_gone_a_renamed_file_never() -> None:
    flash = flash_with(a=b"1", b=b"2")
    flash.rename("a", "b")
    flash.write("c", b"3")
    flash.sync("c")
    found = {(after.read("a"), after.read("b"), after.read("c")) for after in outcomes(flash, 100)}
    assert found == {(a, b, c) for a, b in ((b"1", b"2"), (None, b"1")) for c in (b"3", None)}


def test_removals_without_a_synced_folder_may_be_undone_in_any_order() -> None:
    flash = flash_with(a=b"1", b=b"2")
    flash.remove("a")
    flash.remove("b")
    assert len({tuple(after.names()) for after in outcomes(flash)}) == 4
    flash.sync_folder()
    assert {tuple(after.names()) for after in outcomes(flash)} == {()}


def test_a_folder_that_was_not_synced_may_be_gone_with_its_files() -> None:
    flash = VirtualFlash()
    flash.make_folder("outbox")
    flash.write("outbox/a", b"1")
    flash.sync("outbox/a")
    flash.sync_folder("outbox")
    assert {after.read("outbox/a") for after in outcomes(flash)} == {b"1", None}
    flash.sync_folder()
    assert {after.read("outbox/a") for after in outcomes(flash)} == {b"1"}


def test_a_rename_between_folders_brings_along_what_it_rests_on() -> None:
    flash = VirtualFlash()
    for folder in ("one", "two"):
        flash.make_folder(folder)
    flash.sync_folder()
    flash.write("one/a", b"1")
    flash.sync("one/a")
    flash.rename("one/a", "two/a")
    flash.sync_folder("two")
    assert {tuple(after.names()) for after in outcomes(flash)} == {("two/a",)}


def test_the_same_seed_finds_the_same_flash_and_asking_changes_nothing() -> None:
    flash = flash_with(a=OLD)
    flash.write("a", NEW)
    first = flash.after_power_cut(seeded(3)).read("a")
    assert flash.after_power_cut(seeded(3)).read("a") == first
    assert flash.read("a") == NEW


def test_after_the_power_went_nothing_works() -> None:
    flash = flash_with(a=OLD)
    flash.power_cut = PowerCut(flash.operations + 1, "after")
    flash.boundary("send", "up/1")
    with pytest.raises(PowerCutError, match="after send up/2"):
        flash.boundary("send", "up/2")
    for act in (
        lambda: flash.read("a"),
        flash.names,
        lambda: flash.sync("a"),
        lambda: flash.boundary("send", "up/3"),
    ):
        with pytest.raises(PowerCutError):
            act()


def test_sends_share_the_counter_and_happen_or_not_at_a_cut() -> None:
    cases: tuple[tuple[Moment, int], ...] = (("before", 0), ("after", 1))
    for moment, sent in cases:
        flash = VirtualFlash(power_cut=PowerCut(0, moment))
        messages: list[str] = []
        with pytest.raises(PowerCutError):
            flash.boundary("send", "up/1", partial(messages.append, "up/1"))
        assert len(messages) == sent


def test_a_full_flash_takes_a_part_and_says_so() -> None:
    flash = VirtualFlash(capacity_bytes=10)
    flash.write("a", b"12345")
    with pytest.raises(OSError, match="No space left") as raised:
        flash.append("a", b"67890X")
    assert raised.value.errno == errno.ENOSPC
    assert flash.read("a") == b"1234567890"
    flash.truncate("a", 5)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(flash, "b", b"123456")
    assert flash.names() == ["a"]
    flash.write("a", b"0123456789")
    flash.write_at("a", 9, b"9")
    flash.remove("a")
    write_atomic(flash, "b", b"123456")


def test_a_read_only_flash_can_be_read() -> None:
    flash = flash_with(a=OLD)
    flash.make_folder("one")
    flash.read_only = True
    flash.make_folder("one")
    flash.sync("a")
    changes: tuple[Callable[[], object], ...] = (
        lambda: flash.write("a", b""),
        lambda: flash.append("b", b""),
        lambda: flash.write_at("a", 0, b""),
        lambda: flash.truncate("a", 0),
        lambda: flash.rename("a", "b"),
        lambda: flash.remove("a"),
        lambda: flash.make_folder("two"),
    )
    for act in changes:
        with pytest.raises(OSError, match="Read-only file system") as raised:
            act()
        assert raised.value.errno == errno.EROFS
    assert flash.read("a") == OLD


def test_wear_is_counted_in_pages() -> None:
    flash = VirtualFlash()
    flash.write("a", bytes(4096))
    flash.append("a", b"x")
    flash.write_at("a", 4095, b"xx")
    assert flash.page_writes == 1 + 1 + 2
    assert flash.written_bytes == 4096 + 1 + 2
    assert flash.after_power_cut(seeded(0)).page_writes == 4


def careless_write(disk: Disk, name: str, data: bytes) -> None:
    """Broken: the new name may reach the medium before the new content."""
    disk.write(f".{name}.tmp", data)
    disk.rename(f".{name}.tmp", name)
    disk.sync_folder()


def check_a_replaced_file_is_old_or_new(replace: Callable[[Disk, str, bytes], None]) -> None:
    found = set()
    for after in every_cut(lambda: flash_with(state=OLD), lambda flash: replace(flash, "state", NEW)):
        content = after.read("state")
        assert content in (OLD, NEW), "the file is neither the old one nor the new"
        found.add(content)
        clear_leftovers(after)
        assert after.names() == ["state"]
    assert found == {OLD, NEW}


def test_a_replaced_file_is_old_or_new_after_a_cut_at_any_boundary() -> None:
    check_a_replaced_file_is_old_or_new(write_atomic)


def test_a_rename_without_sync_is_caught() -> None:
    with pytest.raises(AssertionError, match="neither the old one nor the new"):
        check_a_replaced_file_is_old_or_new(careless_write)


def careless_append(disk: Disk, name: str, data: bytes) -> None:
    """Broken: the line may still be in memory when this returns."""
    disk.append(name, data)


def check_lines_are_there_once_appended(append: Callable[[Disk, str, bytes], None]) -> None:
    done: list[int] = []

    def act(flash: VirtualFlash) -> None:
        done.clear()
        for number in range(3):
            append(flash, "log", b"%d" % number * 5000)
            done.append(number)

    for after in every_cut(VirtualFlash, act):
        content, expected = after.read("log") or b"", b"".join(b"%d" % number * 5000 for number in done)
        assert content[: len(expected)] == expected, "a line is gone"


def test_lines_are_there_once_appended() -> None:
    check_lines_are_there_once_appended(append_durably)


def test_an_append_without_sync_is_caught() -> None:
    with pytest.raises(AssertionError, match="a line is gone"):
        check_lines_are_there_once_appended(careless_append)


def test_a_removed_file_is_whole_or_gone() -> None:
    found = {
        after.read("a") for after in every_cut(lambda: flash_with(a=OLD), lambda flash: remove_durably(flash, "a"))
    }
    assert found == {OLD, None}


def test_the_same_content_is_kept_as_a_real_file_under_random_work() -> None:
    random = seeded(5)
    flash = VirtualFlash()
    model: dict[str, bytes] = {}
    for _ in range(3000):
        name = random.choice("abc")
        data = random.randbytes(random.randint(0, 9000))
        if random.random() < 0.3:
            append_durably(flash, name, data)
            model[name] = model.get(name, b"") + data
        else:
            write_atomic(flash, name, data)
            model[name] = data
    assert flash.durable() == model
    assert {name: flash.read(name) for name in flash.names()} == model


def forgetful_append(disk: Disk, name: str, data: bytes) -> None:
    """Broken: it syncs the folder only where no file was, and takes a refused line back in memory only."""
    before = disk.size(name)
    try:
        disk.append(name, data)
        disk.sync(name)
    except OSError:
        if disk.size(name) is not None:
            disk.truncate(name, before or 0)
        raise
    if before is None:
        disk.sync_folder(name.rpartition("/")[0])


def check_refused_lines_stay_away_and_later_ones_stay(append: Callable[[Disk, str, bytes], None]) -> None:
    flash = VirtualFlash(capacity_bytes=50)
    with pytest.raises(OSError, match="No space left"):
        append(flash, "log", b"x" * 51)
    append(flash, "log", b"first\n")
    sync = flash.sync
    flash.sync = _sync_that_fails_once(flash)  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="Input/output error"):
        append(flash, "log", b"refused\n")
    flash.sync = sync  # type: ignore[method-assign]
    assert {after.read("log") for after in outcomes(flash)} == {b"first\n"}, "a line is gone, or a refused one is back"


def _sync_that_fails_once(flash: VirtualFlash) -> Callable[[str], None]:
    """As on a medium that takes the bytes and then reports an error."""
    sync, failures = flash.sync, [OSError(errno.EIO, "Input/output error")]

    def fail_once(name: str) -> None:
        sync(name)
        if failures:
            raise failures.pop()

    return fail_once


def test_refused_lines_stay_away_and_later_ones_stay() -> None:
    check_refused_lines_stay_away_and_later_ones_stay(append_durably)


def test_an_append_that_forgets_its_folder_or_its_refusal_is_caught() -> None:
    with pytest.raises(AssertionError, match="a line is gone"):
        check_refused_lines_stay_away_and_later_ones_stay(forgetful_append)
