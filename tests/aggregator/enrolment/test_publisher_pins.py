"""What the desk tells devices of publishers is what the task's file pins, and the file alone."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.enrolment.assembly import DeskFiles
from fl_protocol.joining import StudyPins
from fl_protocol.message_base import Msg
from fl_protocol.messages import decode, encode
from fl_protocol.signing import public_key_hex
from tests.aggregator.operator_desk import PUBLISHER, Operator, operator

__all__ = ["operator"]
OTHERS = sorted(public_key_hex(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key()) for n in (1, 2))
ENROLMENT = """
[enrolment]
ca = "ca"
key = "keys/desk.key"

[enrolment.broker]
host = "localhost"
port = 1884
"""


def pins_of(operator: Operator, lines: str) -> StudyPins:
    """What the devices of a task pin whose file has these lines, after the wire."""
    operator.says("init", "CONFIG")
    operator.edit("aggregator.toml", "[broker]", f"{ENROLMENT}\n[broker]")
    operator.edit("watch.toml", f'publisher_key = "{PUBLISHER}"', lines)
    operator.says("task", "create", "./watch.toml", "CONFIG")
    files = DeskFiles.load(operator.config)
    store = files.files.open_store()
    try:
        found: Msg = files.pins(store)["watch"]
    finally:
        store.close()
    return decode(encode(found), StudyPins)


def test_one_publisher_is_told_in_the_old_form(operator: Operator) -> None:
    found = pins_of(operator, f'publisher_key = "{PUBLISHER.upper()}"')
    assert found.publisher_key == bytes.fromhex(PUBLISHER)
    assert found.publisher_pins == ((PUBLISHER,), 1)


@pytest.mark.parametrize("keys", [[PUBLISHER, *OTHERS], [*reversed(OTHERS), PUBLISHER.upper()]])
def test_several_are_told_with_their_threshold(operator: Operator, keys: list[str]) -> None:
    found = pins_of(operator, f"publishers = {keys}\npublisher_threshold = 1")
    assert found.publisher_key is None
    assert found.publisher_pins == (tuple(sorted([PUBLISHER, *OTHERS])), 1)


def test_a_task_that_too_few_of_its_publishers_vouch_for_is_not_created(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    keys = [PUBLISHER, *OTHERS]
    operator.edit("watch.toml", f'publisher_key = "{PUBLISHER}"', f"publishers = {keys}\npublisher_threshold = 2")
    code, _, err = operator.run("task", "create", "./watch.toml", "CONFIG")
    assert (code, "signed by 1 of the 3 pinned publishers, and 2 of them must have signed" in err) == (4, True)
    assert operator.json("task", "list", "CONFIG") == []
