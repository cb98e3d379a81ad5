"""Whenever the power goes, what was acknowledged is there once and in order, and what was not is there whole or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from device_client.adapters import encrypted_files
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.errors import StoreError
from device_client.recordings.frames import seal_frame
from device_client.recordings.window_store import Retention, WindowStore
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from fl_protocol.durable import Disk, append_durably
from fl_protocol.model_manifest import LabelSchema

KEY, SHAPE, NOW_S, HOUR_S = b"\x11" * 32, (40, 2), 1.8e9, 3600.0
MAXIMUM_COUNT = 60
_APPENDS = 40
SETTINGS = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
)
Moment = Literal["before", "during", "after"]


class CutsAnywhere(RuleBasedStateMachine):
    """A device that stores windows, prunes, is killed and loses power."""

    def __init__(self) -> None:
        super().__init__()
        self.flash = VirtualFlash()
        self.known: list[int] = []
        self.next, self.at_s = 0, NOW_S
        self.windows = self.open()

    def open(self) -> WindowStore:
        return WindowStore(
            EncryptedFiles(self.flash, KEY),
            "default",
            window_shape=SHAPE,
            label=LabelSchema("class", ("even", "odd")),
            retention=Retention(MAXIMUM_COUNT, 1e9),
            held_out_fraction=0.0,
        )

    def append(self, count: int) -> None:
        numbers = np.arange(self.next, self.next + count)
        self.next += count
        x = np.broadcast_to(numbers[:, None, None], (count, *SHAPE)).astype(np.float32)
        self.windows.append(x, (numbers % 2).astype(np.int32), at_s=self.at_s)
        self.known += [int(number) for number in numbers]

    def found(self) -> list[int]:
        records = self.windows.training()
        assert (records.x == records.x[:, :1, :1]).all(), "a window is torn"
        numbers = [int(number) for number in records.x[:, 0, 0]]
        assert [number % 2 for number in numbers] == list(records.y), "a label is another window's"
        return numbers

    @rule(count=st.integers(1, 5))
    def store(self, count: int) -> None:
        self.append(count)

    @rule(hours=st.integers(0, 50))
    def prune(self, hours: int) -> None:
        self.at_s += hours * HOUR_S
        self.windows.prune(self.at_s)

    @rule(
        count=st.integers(1, 5),
        at=st.integers(0, 6),
        moment=st.sampled_from(get_args(Moment)),
        seed=st.integers(0, 2**32),
        kill=st.booleans(),
        prune=st.booleans(),
    )
    def lose_power(self, count: int, at: int, moment: Moment, seed: int, *, kill: bool, prune: bool) -> None:
        """In the middle of storing or pruning, or of the opening after it."""
        chance = Random(seed)  # noqa: S311 - a test's variety
        offered = range(self.next, self.next + count) if not prune else range(0)
        self.flash.power_cut = PowerCut(self.flash.operations + at, moment)
        try:
            if prune:
                self.at_s += 30 * HOUR_S
                self.windows.prune(self.at_s)
            else:
                self.append(count)
                offered = range(0)
            self.flash.power_cut = PowerCut(self.flash.operations, moment)
            self.flash.boundary("send", "nothing")
        except PowerCutError:
            self.flash = self.flash.after_kill() if kill else self.flash.after_power_cut(chance)
        self.flash.power_cut = PowerCut(self.flash.operations + at, moment)
        try:
            self.windows = self.open()
        except PowerCutError:
            self.flash = self.flash.after_power_cut(chance)
        self.flash.power_cut = None
        self.windows = self.open()
        found = self.found()
        arrived = self.known + list(offered)
        assert found in (self.known[-MAXIMUM_COUNT:], arrived[-MAXIMUM_COUNT:]), "a window is lost or doubled"
        if found and offered and found[-1] == offered[-1]:
            self.known = arrived

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        assert len(self.windows) == min(len(self.known), MAXIMUM_COUNT)
        assert self.windows.appended == len(self.known)

    def teardown(self) -> None:
        self.windows = self.open()
        assert self.found() == self.known[-MAXIMUM_COUNT:], "a window is lost or doubled"


def test_windows_survive_power_cuts_at_any_boundary() -> None:
    run_state_machine_as_test(CutsAnywhere, settings=SETTINGS)


def three_days(machine: CutsAnywhere) -> None:
    """Windows come and are pruned; segments are begun and removed."""
    machine.windows = machine.open()
    for _ in range(_APPENDS):
        machine.append(3)
        machine.at_s += 2 * HOUR_S
        machine.windows.prune(machine.at_s)


def check_every_boundary(outcomes: int) -> int:
    """Cut at each boundary of three days, before, in its middle and after; returns how many cuts there were."""
    whole = CutsAnywhere()
    whole.flash = VirtualFlash()
    three_days(whole)
    assert len(whole.flash.names("recordings/")) < _APPENDS * 3 // (MAXIMUM_COUNT // 8), "no segment was removed"
    for at, moment in itertools.product(range(whole.flash.operations), get_args(Moment)):
        machine = CutsAnywhere()
        machine.flash = cut = VirtualFlash(power_cut=PowerCut(at, moment))
        with pytest.raises(PowerCutError):
            three_days(machine)
        offered = [*machine.known, *range(len(machine.known), machine.next)]
        for seed in range(outcomes):
            machine.flash = cut.after_power_cut(Random(seed))  # noqa: S311 - chance, not secrecy
            machine.windows = machine.open()
            found = machine.found()
            assert found in (machine.known[-MAXIMUM_COUNT:], offered[-MAXIMUM_COUNT:]), "a window is lost or doubled"
            machine.windows.append(np.ones((1, *SHAPE), np.float32), np.ones(1, np.int32), at_s=machine.at_s)
            machine.windows = machine.open()
            assert machine.found() == [*found, 1][-MAXIMUM_COUNT:], "a window is lost or doubled"
    return 3 * whole.flash.operations


def test_windows_survive_a_power_cut_at_every_boundary_of_three_days() -> None:
    assert check_every_boundary(8) > 250


def careless_append(disk: Disk, name: str, data: bytes) -> None:
    """Broken: the frame may still be in memory when this returns."""
    disk.append(name, data)
    if disk.size(name) == len(data):
        disk.sync_folder(name.rpartition("/")[0])


def untruncated(append: Callable[[Disk, str, bytes], None]) -> Callable[[EncryptedFiles, str, int, bytes], None]:
    """Broken: what a torn append left stays in front of the next frame."""

    def append_frame(self: EncryptedFiles, name: str, number: int, data: bytes) -> None:
        frame = seal_frame(self._key_of(name), name, number, data, nonce=self.entropy(12))
        self._make_folder(name)
        append(self._disk, name, frame)
        self._ends[name] = number + 1, self._disk.size(name) or 0

    return append_frame


def test_a_frame_without_sync_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_files, "append_durably", careless_append)
    with pytest.raises(AssertionError, match="lost or doubled"):
        check_every_boundary(20)


def test_a_torn_end_that_is_not_cut_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncryptedFiles, "append_frame", untruncated(append_durably))
    with pytest.raises((AssertionError, StoreError), match=r"lost or doubled|damaged or incomplete"):
        check_every_boundary(20)


class Unauthenticated:
    """Broken: AES-GCM without its tag, so a torn frame whose length is right is taken as it is."""

    def __init__(self, key: bytes) -> None:
        del key

    def encrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
        del nonce, bound
        return data + bytes(16)

    def decrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
        del nonce, bound
        return data[:-16]


def test_frames_that_are_not_authenticated_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_files, "AESGCM", Unauthenticated)
    with pytest.raises((AssertionError, StoreError), match=r"torn|another window|lost or doubled|cannot be read"):
        check_every_boundary(60)
