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
SCALED = mosquitto_acl(tenant="clinic", aggregator="sum-1", workers=("worker-1", "worker-2"))
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


def test_a_worker_that_commits_hundreds_at_a_time_does_not_stall_the_broker() -> None:
    """The batch of the ingest is at most 256 updates, and half the window may be held for incomplete ones."""
    assert int(options(CONFIG)["max_inflight_messages"]) >= 2 * 256


def test_what_is_held_for_a_worker_that_is_away_holds_a_fleets_burst_in_bounded_memory() -> None:
    found = options(CONFIG)
    messages, held_bytes = int(found["max_queued_messages"]), int(found["max_queued_bytes"])
    assert messages >= 5_000
    assert 5_000 * 40_000 <= held_bytes <= 2**30
    assert found["persistence"] == "false"


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


def test_without_workers_the_acl_names_none() -> None:
    assert mosquitto_acl(tenant="clinic", aggregator="sum-1", workers=()) == ACL
    assert [line for line in ACL.splitlines() if line.startswith("user ")] == ["user sum-1"]


@pytest.mark.parametrize("worker", ["worker-1", "worker-2"])
def test_a_worker_reads_uploads_and_answers_devices(worker: str) -> None:
    for shard in (0, 63):
        assert allowed(SCALED, worker, "read", f"fl/v1/clinic/up/{shard:02d}/watch-7/{UPDATE.hex()}/0")
    for kind in ("receipt", "nack", "control"):
        assert allowed(SCALED, worker, "write", f"fl/v1/clinic/down/watch-7/{kind}")


def test_a_worker_publishes_nothing_in_the_studys_name() -> None:
    own = {("write", f"fl/v1/clinic/up/+/{'worker-1'}/+/+"), ("write", "fl/v1/clinic/state/worker-1")}
    own |= {("read", f"fl/v1/clinic/{rest}") for rest in ("down/worker-1/+", "round/+", "model/+/+")}
    as_helper = "fl/v1/clinic/helper/worker-1"  # of its own name, which no configuration pins
    own |= {("read", f"{as_helper}/request/+/+")}
    own |= {("write", f"{as_helper}/{rest}") for rest in ("key", "refusal", "answer/+/+")}
    work = {("read", "fl/v1/clinic/up/#"), ("write", "fl/v1/clinic/down/#")}
    assert set(rights(SCALED, "worker-1")) == own | work
    assert set(rights(ACL, "worker-1")) == own


def test_workers_change_nobody_elses_rights() -> None:
    for name in ("sum-1", "watch-7", "worker-3"):
        assert rights(SCALED, name) == rights(ACL, name)


def test_one_that_stands_by_has_the_aggregators_rights_and_changes_nobody_elses() -> None:
    paired = mosquitto_acl(tenant="clinic", aggregator="sum-1", standbys=("sum-2",), workers=("worker-1", "worker-2"))

    def own(name: str) -> set[tuple[str, str]]:
        return {(action, topic.replace(name, "NAME")) for action, topic in rights(paired, name)}

    assert own("sum-2") == own("sum-1")
    for name in ("sum-1", "watch-7", "worker-1"):
        assert rights(paired, name) == rights(SCALED, name)


def test_two_with_one_name_are_refused() -> None:
    with pytest.raises(LocalMisuseError, match="expected a name of its own"):
        mosquitto_acl(tenant="clinic", aggregator="sum-1", standbys=("sum-1",))
    for workers in (("sum-1",), ("worker-1", "worker-1")):
        with pytest.raises(LocalMisuseError, match="expected a name of its own"):
            mosquitto_acl(tenant="clinic", aggregator="sum-1", workers=workers)


@pytest.mark.parametrize("name", ["", "#", "+", "a/b", "clinic\nuser watch-7", "clinic #", "Clinic"])
def test_a_name_that_would_change_the_files_meaning_is_refused(name: str) -> None:
    with pytest.raises(LocalMisuseError, match="tenant: expected"):
        mosquitto_acl(tenant=name, aggregator="sum-1")
    with pytest.raises(LocalMisuseError, match="aggregator: expected"):
        mosquitto_acl(tenant="clinic", aggregator=name)
    with pytest.raises(LocalMisuseError, match="worker: expected"):
        mosquitto_acl(tenant="clinic", aggregator="sum-1", workers=(name,))


@pytest.mark.parametrize("field", ["host", "folder", "user"])
def test_a_line_break_in_a_setting_is_refused(field: str) -> None:
    arguments = {"host": "127.0.0.1", "folder": "/etc/covey", "user": "covey", field: "x\nallow_anonymous true"}
    with pytest.raises(LocalMisuseError, match=f"{field}: expected one line"):
        mosquitto_config(port=8883, **arguments)
