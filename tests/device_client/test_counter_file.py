"""The ledger's counter in a file: durable, whole after every failure, of this store only."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.adapters.counter_file import MAXIMUM_BYTES, CounterFile
from device_client.errors import LedgerError, StoreError
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.errors import LocalMisuseError

KEY, NAME = b"\x11" * 32, "store.counter"


def chance(seed: int) -> Random:
    """A simulation's, which repeats itself."""
    return Random(seed)  # noqa: S311


@given(values=st.lists(st.binary(max_size=MAXIMUM_BYTES), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_the_next_process_reads_what_was_advanced_to_last(values: list[bytes]) -> None:
    disk = VirtualFlash()
    assert CounterFile(disk, NAME, KEY).read() is None
    counter = CounterFile(disk, NAME, KEY)
    for value in values:
        counter.advance(value)
        assert counter.read() == value
        assert CounterFile(disk.after_power_cut(chance(1)), NAME, KEY).read() == value
    counter = CounterFile(disk, NAME, KEY)  # goes on where the process before stopped
    counter.advance(b"next")
    assert CounterFile(disk, NAME, KEY).read() == b"next"


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_power_cut_at_any_moment_leaves_the_old_one_or_the_new(moment: str) -> None:
    for at in range(8):
        for seed in range(20):
            disk = VirtualFlash(random=chance(seed))
            counter = CounterFile(disk, NAME, KEY)
            for value in (b"one", b"two", b"three"):
                counter.advance(value)
            disk.power_cut = PowerCut(disk.operations + at, moment)  # type: ignore[arg-type]
            done = [b"three"]
            try:
                for number in range(9):
                    done.append(b"%d" % number)
                    counter.advance(done[-1])
                pytest.fail("the power was not cut")
            except PowerCutError:
                pass
            again = CounterFile(disk.after_power_cut(chance(seed)), NAME, KEY)
            assert again.read() in done[-2:]
            again.advance(b"later")
            assert again.read() == b"later"


def test_an_advance_changes_one_slot_in_place(tmp_path: Path) -> None:
    counter, path = CounterFile(SystemDisk(tmp_path), NAME, KEY), tmp_path / NAME
    counter.advance(b"one")
    before, inode = path.read_bytes(), path.stat().st_ino
    assert len(before) == 8192
    counter.advance(b"two")
    assert (len(path.read_bytes()), path.stat().st_ino) == (8192, inode)
    assert path.read_bytes()[:4096] == before[:4096]
    counter.advance(b"three")
    assert path.read_bytes()[:4096] != before[:4096]
    assert [entry.name for entry in tmp_path.iterdir()] == [NAME]
    assert path.stat().st_mode & 0o077 == 0


def test_a_slot_that_is_damaged_gives_way_to_the_other_and_two_are_noticed(tmp_path: Path) -> None:
    counter, path = CounterFile(SystemDisk(tmp_path), NAME, KEY), tmp_path / NAME
    counter.advance(b"one")
    counter.advance(b"two")
    raw = bytearray(path.read_bytes())
    raw[4096 + 40] ^= 1
    path.write_bytes(raw)
    assert CounterFile(SystemDisk(tmp_path), NAME, KEY).read() == b"one"
    raw[40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(LedgerError, match="is damaged, or belongs to a store with another key"):
        CounterFile(SystemDisk(tmp_path), NAME, KEY).read()
    # A person may accept that (`PrivacyLedger.reanchor`): it is then made anew.
    counter = CounterFile(SystemDisk(tmp_path), NAME, KEY)
    counter.advance(b"three")
    assert CounterFile(SystemDisk(tmp_path), NAME, KEY).read() == b"three"


def test_slots_cannot_change_places(tmp_path: Path) -> None:
    counter, path = CounterFile(SystemDisk(tmp_path), NAME, KEY), tmp_path / NAME
    counter.advance(b"one")
    counter.advance(b"two")
    raw = path.read_bytes()
    path.write_bytes(raw[4096:] + raw[:4096])
    with pytest.raises(LedgerError):
        CounterFile(SystemDisk(tmp_path), NAME, KEY).read()


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_cut_file_is_noticed(tmp_path: Path, length: int) -> None:
    CounterFile(SystemDisk(tmp_path), NAME, KEY).advance(b"one")
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:length])
    with pytest.raises(LedgerError, match="damaged"):
        CounterFile(SystemDisk(tmp_path), NAME, KEY).read()


def test_another_key_reads_nothing_and_it_may_be_moved(tmp_path: Path) -> None:
    CounterFile(SystemDisk(tmp_path), NAME, KEY).advance(b"one")
    with pytest.raises(LedgerError, match="another key"):
        CounterFile(SystemDisk(tmp_path), NAME, b"\x12" * 32).read()
    (tmp_path / NAME).rename(tmp_path / "moved")
    assert CounterFile(SystemDisk(tmp_path), "moved", KEY).read() == b"one"


def test_nonces_are_never_used_twice_for_a_slot_that_is_written_again() -> None:
    disk = VirtualFlash()
    CounterFile(disk, NAME, KEY).advance(b"one")
    nonces = set()
    for seed in range(5):
        after = disk.after_power_cut(chance(seed))
        CounterFile(after, NAME, KEY).advance(b"two")  # each time the same number, from the same state
        nonces.add((after.read(NAME) or b"")[4096:][:12])
    assert len(nonces) == 5


def test_a_disk_that_fails_is_told_and_nothing_is_lost() -> None:
    disk = VirtualFlash(read_only=True)
    with pytest.raises(StoreError, match=r"counter store\.counter cannot be written \(Read-only file system\)"):
        CounterFile(disk, NAME, KEY).advance(b"one")
    disk.read_only = False
    counter = CounterFile(disk, NAME, KEY)
    counter.advance(b"one")
    counter.advance(b"two")
    disk.read_only = True
    with pytest.raises(StoreError):
        counter.advance(b"three")
    assert CounterFile(disk, NAME, KEY).read() == b"two"
    disk.read_only = False
    counter.advance(b"three")
    assert CounterFile(disk, NAME, KEY).read() == b"three"


def test_a_folder_where_the_file_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        CounterFile(SystemDisk(tmp_path), NAME, KEY).read()


def test_more_than_fits_is_refused() -> None:
    with pytest.raises(LocalMisuseError, match="at most 128"):
        CounterFile(VirtualFlash(), NAME, KEY).advance(bytes(129))
