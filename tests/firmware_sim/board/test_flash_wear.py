"""A flash that has been written too often can only be read."""

from __future__ import annotations

import errno
import os

import pytest

from firmware_sim.board.flash_wear import FlashWear
from firmware_sim.profiles.hardware_profile import Flash
from firmware_sim.virtual_flash import VirtualFlash

SMALL = Flash(capacity_bytes=40_960, page_bytes=4_096, write_bytes_per_s=1e6, endurance_writes=3)


def test_wear_is_spread_over_all_pages_and_ends_in_a_flash_that_can_only_be_read() -> None:
    flash, wear = VirtualFlash(page_bytes=4_096), FlashWear(SMALL)
    for turn in range(1, 30):
        flash.write("blob", bytes(4_096))
        assert wear.take(flash) == (turn >= 30)
    assert wear.share(flash.page_writes) == pytest.approx(29 / 30)
    flash.write("blob", b"last")
    assert wear.take(flash)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        flash.write("blob", b"more")
    assert flash.read("blob") == b"last"


def test_a_used_flash_has_less_life_left() -> None:
    assert FlashWear(SMALL, page_writes_before=15).share(15) == 1.0
