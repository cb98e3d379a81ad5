"""What is printed on the wearer's terminal holds no commands to it."""

from __future__ import annotations

import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.status import status_text
from fl_protocol.terminal import visible
from tests.device_client.one_device import TENANT, OneDevice


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("\x1b[2Jmay train: yes", r"\x1b[2Jmay train: yes"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("one\ntwo\rthree", r"one\ntwo\rthree"),
        ("\u202eyes", r"\u202eyes"),
        ("\udcff", r"\udcff"),
        ("Schrittzähler, 歩数, خطوات", "Schrittzähler, 歩数, خطوات"),
    ],
)
def test_what_is_not_printable_is_written_out(given_text: str, shown: str) -> None:
    assert visible(given_text) == shown


@given(st.text())
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    assert not {unicodedata.category(one) for one in visible(text)} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_a_broker_without_a_key_cannot_write_to_the_terminal() -> None:
    one = OneDevice()
    device = one.start()
    one.steps(3)
    hostile = msgspec.msgpack.encode({"\x1b[2J\x1b]0;owned\x07may train: yes": 1})
    one.scripts["watch"].broker.publish(f"fl/v1/{TENANT}/round/watch", hostile, retain=False)
    one.until("message_refused")
    lines = status_text(device.status())
    assert any("message refused" in line for line in lines)
    assert all(line.isprintable() for line in lines)
