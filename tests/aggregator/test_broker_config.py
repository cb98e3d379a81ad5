"""The text of mosquitto's files; what they do is tried in tests/contracts/test_broker_security.py."""

from __future__ import annotations

import pytest

from aggregator.broker_config import mosquitto_acl, mosquitto_config
from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES, chunk_data_bytes
from fl_protocol.topics import down_filter, model_filter, round_topic, state_topic, upload_filter, upload_topic


def options(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))


def matches(pattern: str, topic: str) -> bool:
    """MQTT's rule for filters, `%u` filled in before."""
    parts, levels = pattern.split("/"), topic.split("/")
    if parts[-1] == "#":
        return levels[: len(parts) - 1] == parts[:-1]
    return len(parts) == len(levels) and all(part in {"+", level} for part, level in zip(parts, levels, strict=True))


def rights(acl: str, user: str) -> list[tuple[str, str]]:
    """(read or write, filter) of a user, as mosquitto reads the file: patterns hold for everybody."""
    found, current = [], None
    for line in acl.splitlines():
        words = line.split()
        if words[:1] == ["user"]:
            current = words[1]
        elif words[:1] == ["topic"] and current == user:
            found.append((words[1], words[2]))
        elif words[:1] == ["pattern"]:
            found.append((words[1], words[2].replace("%u", user)))
    return found


def allowed(acl: str, user: str, action: str, topic: str) -> bool:
    return any(kind == action and matches(pattern, topic) for kind, pattern in rights(acl, user))


CONFIG = mosquitto_config(host="10.1.2.3", port=8883, folder="/etc/covey broker", user="covey")
ACL = mosquitto_acl(tenant="clinic", aggregator="sum-1")
UPDATE = bytes(16)


def test_the_listener_asks_for_a_certificate_over_tls_13_only() -> None:
    found = options(CONFIG)
    assert found["listener"] == "8883 10.1.2.3"
    assert found["tls_version"] == "tlsv1.3"
    assert found["require_certificate"] == "true"
    assert found["allow_anonymous"] == "false"
    assert (found["use_identity_as_username"], found["use_username_as_clientid"]) == ("true", "true")
    assert found["acl_file"] == "/etc/covey broker/acl"
    assert CONFIG.count("listener ") == 1
    assert "password_file" not in CONFIG


def test_the_packet_limit_leaves_room_for_the_largest_chunk() -> None:
    limit = int(options(CONFIG)["max_packet_size"])
    assert limit == MAX_PACKET_BYTES + PACKET_RESERVE_BYTES
    assert chunk_data_bytes(limit) == chunk_data_bytes(None)


def test_the_acl_covers_every_topic_of_the_protocol() -> None:
    device = "watch-7"
    assert allowed(ACL, device, "write", upload_topic("clinic", device, UPDATE, 3))
    assert allowed(ACL, device, "write", state_topic("clinic", device))
    assert allowed(ACL, device, "read", down_filter("clinic", device))
    assert allowed(ACL, device, "read", round_topic("clinic", "steps"))
    assert allowed(ACL, device, "read", model_filter("clinic", bytes(32)))
    assert allowed(ACL, "sum-1", "read", upload_filter("clinic"))
    for topic in (
        round_topic("clinic", "steps"),
        f"{model_filter('clinic', bytes(32))[:-1]}0",
        "fl/v1/clinic/down/a/nack",
    ):
        assert allowed(ACL, "sum-1", "write", topic)


def test_the_acl_gives_a_device_nothing_of_others() -> None:
    device, other = "watch-7", "watch-8"
    for action, topic in [
        ("write", upload_topic("clinic", other, UPDATE, 0)),
        ("read", upload_topic("clinic", other, UPDATE, 0)),
        ("read", upload_topic("clinic", device, UPDATE, 0)),
        ("write", state_topic("clinic", other)),
        ("read", state_topic("clinic", other)),
        ("read", f"fl/v1/clinic/down/{other}/receipt"),
        ("write", f"fl/v1/clinic/down/{device}/receipt"),
        ("write", round_topic("clinic", "steps")),
        ("write", f"fl/v1/clinic/model/{'0' * 64}/0"),
        ("read", round_topic("other-clinic", "steps")),
        ("write", upload_topic("other-clinic", device, UPDATE, 0)),
        ("read", "$SYS/broker/version"),
    ]:
        assert not allowed(ACL, device, action, topic), (action, topic)
    assert not allowed(ACL, "sum-1", "write", upload_topic("clinic", device, UPDATE, 0))


@pytest.mark.parametrize("name", ["", "#", "+", "a/b", "clinic\nuser watch-7", "clinic #", "Clinic"])
def test_a_name_that_would_change_the_files_meaning_is_refused(name: str) -> None:
    with pytest.raises(LocalMisuseError, match="tenant: expected"):
        mosquitto_acl(tenant=name, aggregator="sum-1")
    with pytest.raises(LocalMisuseError, match="aggregator: expected"):
        mosquitto_acl(tenant="clinic", aggregator=name)


@pytest.mark.parametrize("field", ["host", "folder", "user"])
def test_a_line_break_in_a_setting_is_refused(field: str) -> None:
    arguments = {"host": "127.0.0.1", "folder": "/etc/covey", "user": "covey", field: "x\nallow_anonymous true"}
    with pytest.raises(LocalMisuseError, match=f"{field}: expected one line"):
        mosquitto_config(port=8883, **arguments)
