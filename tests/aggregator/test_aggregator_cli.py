"""``covey-aggregator``: setting up, its exit codes, and errors a person can act on."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError

from aggregator.assembly import AggregatorFiles, assemble
from aggregator.device_list import read_devices
from aggregator.worker_files import worker_files
from device_client.pseudonyms import Pseudonyms
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from fl_protocol.errors import ConfigError
from tests.aggregator.operator_desk import Events, Operator, Result, one_sentence, operator
from tests.device_client.ports import MemoryStore
from tests.enrolments import broken_copy

__all__ = ["operator"]
KEY = "ab" * 31 + "aa"
COMMANDS = (
    "init", "run", "worker", "status", "watch", "backup", "restore", "broker", "broker config", "broker check",
    "enrolment", "enrolment init", "enrolment claim", "enrolment run", "enroll-token", "enroll-token create",
    "enroll-token list", "enroll-token withdraw", "device show", "device revoke", "device quarantine", "device restore",
    "api",
    "task", "task create", "task list", "task show", "task pause", "task resume", "task abort",
    "model", "model list", "model show", "model tag", "model rollback", "model export",
    "publisher", "publisher keygen", "publisher sign", "publisher show",
    "device", "device add", "device import", "device remove", "device list", "device admit",
    "ca", "ca init", "ca server", "ca client",
    "account", "account create", "account list", "account disable",
    "token", "token create", "token list", "token revoke",
    "webhook", "webhook secret", "webhook list", "webhook test",
)  # fmt: skip
GROUPS = {one for one in COMMANDS if any(other.startswith(f"{one} ") for other in COMMANDS)}


def test_init_makes_key_and_database_once(operator: Operator) -> None:
    key = operator.says("init", "CONFIG")
    assert re.fullmatch(r"[0-9a-f]{64}\n", key)
    assert operator.says("init", "CONFIG") == key
    assert (operator.folder / "keys" / "aggregator.key").stat().st_mode & 0o077 == 0
    assert operator.json("task", "list", "CONFIG") == []


def test_help_shows_examples_and_exit_codes(operator: Operator) -> None:
    out = operator.says("--help")
    assert "covey-aggregator init" in out
    codes = "Exit codes: 0 done, 1 other error, 2 usage or configuration, 3 database, 4 model bundle."
    assert codes in " ".join(out.split())
    for command in COMMANDS:
        assert operator.run(*command.split(), "--help")[0] == 0, command
    assert operator.says("--version").startswith("covey-aggregator ")


@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in GROUPS])
def test_the_help_of_every_command_has_an_example_with_options_that_there_are(operator: Operator, command: str) -> None:
    out = operator.says(*command.split(), "--help")
    found = re.findall(rf"covey-aggregator ({command} .*)", out)
    assert found
    described = out.split("Options", 1)[1].split("Example", 1)[0]
    for line in found:
        for option in re.findall(r"--[\w-]+", line):
            assert option in described, (line, option)


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["init"],
        ["worker", "CONFIG"],
        ["task", "create", "CONFIG"],
        ["task", "abort", "watch", "CONFIG"],
        ["task", "show", "watch", "CONFIG", "--last", "0"],
        ["model", "export", "watch", "CONFIG"],
        ["model", "export", "watch", "CONFIG", "--out", "o", "--version", "-1"],
        ["device", "add", "CONFIG"],
        ["device", "admit", "request.json", "CONFIG"],
        ["device", "admit", "r", "CONFIG", "--ca", "c", "--out", "o", "--period-days", "1"],
        ["ca", "init"],
        ["ca", "server", "--ca", "ca", "--out", "mosquitto"],
    ],
)
def test_wrong_usage_is_exit_code_2(operator: Operator, arguments: list[str]) -> None:
    code, _, err = operator.run(*arguments)
    assert code == 2
    assert "Usage" in err


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('tenant = "clinic"', 'tenant = "Clinic/1"', "aggregator.tenant"),
        ('tenant = "clinic"', "", "tenant"),
        ("port = 1883", "port = 99999", "broker.port"),
        ('host = "localhost"', 'hots = "localhost"', "hots"),
        ("[broker]", "[task]\n[broker]", "task"),
        ("[broker]", "[broker", "aggregator.toml"),
        ('database = "aggregator.db"', 'database = "postgresql+psycopg://db/covey"', "aggregator.blobs"),
    ],
)
def test_a_wrong_key_in_the_configuration_is_named(operator: Operator, old: str, new: str, word: str) -> None:
    operator.edit("aggregator.toml", old, new)
    one_sentence(operator.run("init", "CONFIG"), 2, word)


def test_a_missing_configuration_or_key_is_named(operator: Operator) -> None:
    one_sentence(operator.run("run", "CONFIG"), 2, "aggregator.signing_key")
    operator.config.unlink()
    one_sentence(operator.run("run", "CONFIG"), 2, "aggregator.toml")


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o644), lambda path: path.write_bytes(b"short")])
def test_a_signing_key_that_cannot_be_trusted_is_refused(operator: Operator, spoil: Callable[[Path], object]) -> None:
    operator.run("init", "CONFIG")
    spoil(operator.folder / "keys" / "aggregator.key")
    one_sentence(operator.run("run", "CONFIG"), 2, "signing key")


def test_a_database_that_is_none_is_one_sentence(operator: Operator) -> None:
    for command in (["status"], ["task", "list"], ["device", "list"], ["device", "add", "watch-7", KEY]):
        one_sentence(operator.run(*command, "CONFIG"), 3, "no database", "covey-aggregator init", "aggregator.database")
    assert not (operator.folder / "aggregator.db").exists()
    (operator.folder / "aggregator.db").write_bytes(b"this is no database" * 100)
    one_sentence(operator.run("status", "CONFIG"), 3, "database")
    operator.edit("aggregator.toml", 'database = "aggregator.db"', 'database = "model.covey/aggregator.db"')
    one_sentence(operator.run("init", "CONFIG"), 3, "model.covey/aggregator.db")


def test_run_never_makes_a_database(operator: Operator) -> None:
    """With a mistyped path it would run no task, and nobody would notice."""
    operator.says("init", "CONFIG")
    operator.edit("aggregator.toml", 'database = "aggregator.db"', 'database = "agregator.db"')
    one_sentence(operator.run("run", "CONFIG"), 3, "no database")
    one_sentence(operator.run("worker", "CONFIG", "--name", "worker-1"), 3, "no database")


def test_a_configured_aggregator_assembles(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    service = assemble(AggregatorFiles.load(operator.config), journal=Events())
    assert service.coordinator is not None
    service.store.close()
    worker = assemble(AggregatorFiles.load(operator.config), journal=Events(), worker="worker-1")
    assert (worker.coordinator, worker.worker.name) == (None, "worker-1")
    worker.store.close()


# Workers have an identity of their own at the broker.


def test_a_worker_without_tls_needs_a_name_of_its_own_only(operator: Operator) -> None:
    files = AggregatorFiles.load(operator.config)
    made = worker_files(files, name="worker-1", certificate=None, key=None, metrics_port=9101)
    assert made.config.broker == files.config.broker
    assert made.config.aggregator.metrics_port == 9101
    with pytest.raises(ConfigError, match="is the client_id of covey-aggregator run"):
        worker_files(files, name="aggregator", certificate=None, key=None, metrics_port=None)
    one_sentence(operator.run("worker", "CONFIG", "--name", "Worker 1"), 1, "--name")


def test_a_worker_never_borrows_the_aggregators_certificate(operator: Operator) -> None:
    """At the broker it would be the aggregator, and end its connection."""
    tls = 'port = 1883\nca = "keys/ca.pem"\ncertificate = "keys/aggregator.pem"\nkey = "keys/aggregator.key"'
    operator.edit("aggregator.toml", "port = 1883", tls)
    files = AggregatorFiles.load(operator.config)
    with pytest.raises(
        ConfigError, match=r"expected its certificate at .*worker-1\.pem; make it with covey-aggregator ca"
    ):
        worker_files(files, name="worker-1", certificate=None, key=None, metrics_port=None)
    operator.says("ca", "init", "--ca", "./ca")
    operator.says("ca", "client", "--ca", "./ca", "--name", "worker-1", "--out", "./keys")
    made = worker_files(files, name="worker-1", certificate=None, key=None, metrics_port=None).config.broker
    keys = operator.folder.absolute() / "keys"
    assert (made.certificate, made.key, made.ca) == (
        str(keys / "worker-1.pem"),
        str(keys / "worker-1.key"),
        "keys/ca.pem",
    )
    check_its_own_identity(files, worker_files)
    check_its_own_identity(files, broken_copy("aggregator.worker_files").worker_files)
    borrowing = broken_copy("aggregator.worker_files", ("broker = _with_its_own(broker, files.path, name)", "pass"))
    with pytest.raises(pytest.fail.Exception):
        check_its_own_identity(files, borrowing.worker_files)
    given = worker_files(files, name="w", certificate=Path("c.pem"), key=Path("k.pem"), metrics_port=None).config.broker
    assert (given.certificate, given.key) == (str(Path("c.pem").absolute()), str(Path("k.pem").absolute()))
    with pytest.raises(ConfigError, match="--certificate and --key together"):
        worker_files(files, name="w", certificate=Path("c.pem"), key=None, metrics_port=None)


def check_its_own_identity(files: AggregatorFiles, make: Callable[..., AggregatorFiles]) -> None:
    with pytest.raises(ConfigError, match="worker-9: expected its certificate"):
        make(files, name="worker-9", certificate=None, key=None, metrics_port=None)


# Devices.


def test_devices_are_registered_one_by_one_and_listed(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    assert operator.says("device", "add", "CONFIG", "watch-7", KEY) == "watch-7 may send updates\n"
    assert operator.says("device", "list", "CONFIG") == f"watch-7  {KEY}\n"
    assert operator.json("device", "list", "CONFIG") == [{"device": "watch-7", "public_key": KEY}]


@pytest.mark.parametrize(
    ("name", "key", "word"),
    [("Watch 7", "ab" * 32, "device"), ("watch-7", "xyz", "64 hex digits"), ("../x", "ab" * 32, "device")],
)
def test_a_device_that_cannot_be_registered_is_one_sentence(operator: Operator, name: str, key: str, word: str) -> None:
    operator.run("init", "CONFIG")
    one_sentence(operator.run("device", "add", "CONFIG", name, key), 1, word)
    assert operator.says("device", "list", "CONFIG") == ""


def test_thousands_of_devices_are_imported_from_a_file(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    lines = ["device,public_key", "", *(f" watch-{index} , {2**200 + index:064x}" for index in range(3000))]
    operator.write("devices.csv", "\ufeff" + "\r\n".join(lines))
    assert operator.says("device", "import", "./devices.csv", "CONFIG") == "3000 devices may send updates\n"
    operator.write("again.csv", f"watch-0,{KEY}")
    assert operator.says("device", "import", "./again.csv", "CONFIG") == "1 devices may send updates\n"
    listed = {one["device"]: one["public_key"] for one in operator.json("device", "list", "CONFIG")}
    assert len(listed) == 3000
    assert (listed["watch-0"], listed["watch-2999"]) == (KEY, f"{2**200 + 2999:064x}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["at least one line"]),
        ("device,public_key\n", ["at least one line"]),
        (f"watch-1,{KEY}\nWatch 2,{KEY}", ["line 2", "device"]),
        (f"watch-1,{KEY}\nwatch-2,xyz", ["line 2", "64 hex digits"]),
        (f"watch-1,{KEY}\n\nwatch-1,{KEY}", ["line 3", "watch-1 was named before"]),
        (f"watch-1,{KEY},x", ["line 1", "got 3 fields"]),
        ("\x00\xff,\x00", ["line 1"]),
    ],
)
def test_a_file_of_devices_with_a_bad_line_registers_none(operator: Operator, text: str, words: list[str]) -> None:
    operator.says("init", "CONFIG")
    (operator.folder / "devices.csv").write_bytes(text.encode("latin-1"))
    one_sentence(operator.run("device", "import", "./devices.csv", "CONFIG"), 2, *words)
    assert operator.says("device", "list", "CONFIG") == ""


def check_no_name_comes_twice(read: Callable[[bytes, str], object]) -> None:
    with pytest.raises(ConfigError, match="line 2: watch-1 was named before"):
        read(f"watch-1,{KEY}\nwatch-1,{'cd' * 32}".encode(), "devices.csv")


def test_a_name_that_comes_twice_in_a_file_is_refused_and_a_broken_copy_is_caught() -> None:
    check_no_name_comes_twice(read_devices)
    check_no_name_comes_twice(broken_copy("aggregator.device_list").read_devices)
    broken = broken_copy("aggregator.device_list", ("if device in found:", "if False:"))
    with pytest.raises(pytest.fail.Exception):
        check_no_name_comes_twice(broken.read_devices)


def test_a_removed_device_is_gone_and_only_it(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    for name in ("watch-7", "watch-8"):
        operator.says("device", "add", "CONFIG", name, KEY)
    assert operator.says("device", "remove", "CONFIG", "watch-7") == "watch-7 may send no more updates\n"
    assert operator.says("device", "list", "CONFIG") == f"watch-8  {KEY}\n"
    one_sentence(operator.run("device", "remove", "CONFIG", "watch-7"), 1, "watch-7 is not registered")


# The broker's files.


def test_the_brokers_files_are_written_anew_for_every_worker(operator: Operator) -> None:
    out = operator.says("broker", "config", "CONFIG", "--out", "./broker", "--user", "somebody")
    assert out.split() == [str(operator.folder / "broker" / name) for name in ("mosquitto.conf", "acl")]
    text = (operator.folder / "broker" / "mosquitto.conf").read_text()
    for words in ("listener 1883 0.0.0.0", f"acl_file {operator.folder.absolute()}/broker/acl", "user somebody"):
        assert words in text
    assert "user worker-1" not in (operator.folder / "broker" / "acl").read_text()
    operator.says("broker", "config", "CONFIG", "--out", "./broker", "--worker", "worker-1", "--worker", "worker-2")
    acl = (operator.folder / "broker" / "acl").read_text()
    for name in ("aggregator", "worker-1", "worker-2"):
        assert f"user {name}\n" in acl
    one_sentence(
        operator.run("broker", "config", "CONFIG", "--out", "./broker", "--worker", "aggregator"), 1, "workers"
    )
    one_sentence(operator.run("broker", "config", "CONFIG", "--out", "./model.covey/x"), 2, "--out")


# The CA, and admission.


def make_request(count: int = 3) -> bytes:
    return Pseudonyms(MemoryStore(), tenant="clinic", task="watch").prepare(count=count, entropy=os.urandom)


def set_up(operator: Operator) -> str:
    """The aggregator's public key."""
    key = operator.says("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    return key


def admit(operator: Operator, request: str = "request.json", *options: str, out: str = "answer.json") -> Result:
    folder = operator.folder
    places = ["--ca", str(folder / "ca"), "--out", str(folder / out)]
    return operator.run("device", "admit", str(folder / request), "CONFIG", *places, *options)


def test_a_ca_admits_devices_and_certifies_broker_and_aggregator(operator: Operator) -> None:
    folder = operator.folder
    key = set_up(operator)
    code, out, err = operator.run("ca", "init", "--ca", str(folder / "ca"))
    assert (code, err) == (0, "")
    assert "ca.key for nobody else" in out
    assert {path.name: path.stat().st_mode & 0o777 for path in (folder / "ca").iterdir()} == {
        "ca.pem": 0o644,
        "ca.key": 0o600,
    }
    (folder / "request.json").write_bytes(make_request())
    code, out, err = admit(operator)
    assert (code, err) == (0, "")
    assert out.startswith("3 pseudonyms may send updates, one after the other, ")
    assert "then delete it" in out
    answer = decode_file((folder / "answer.json").read_bytes(), PseudonymAnswer)
    assert answer.aggregator_key == key.strip()
    assert (folder / "answer.json").stat().st_mode & 0o077 == 0
    listed = operator.run("device", "list", "CONFIG")[1]
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(one.id for one in answer.certificates)
    for command, names in (
        (["server", "--host", "127.0.0.1", "--host", "localhost"], {"broker.pem", "broker.key", "ca.pem"}),
        (["client", "--name", "aggregator"], {"aggregator.pem", "aggregator.key", "ca.pem"}),
    ):
        place = folder / command[0]
        code, out, err = operator.run("ca", *command, "--ca", str(folder / "ca"), "--out", str(place))
        assert (code, err) == (0, "")
        assert {path.name for path in place.iterdir()} == names
        assert all(path.stat().st_mode & 0o077 == 0 for path in place.glob("*.key"))


def test_nothing_is_overwritten(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    ca, server = str(operator.folder / "ca"), str(operator.folder / "mosquitto")
    operator.run("ca", "init", "--ca", ca)
    operator.run("ca", "server", "--ca", ca, "--host", "localhost", "--out", server)
    (operator.folder / "request.json").write_bytes(make_request())
    before = {path: path.read_bytes() for path in operator.folder.rglob("*") if path.is_file()}
    one_sentence(operator.run("ca", "init", "--ca", ca), 2, "--ca", "exists and is not replaced")
    again = operator.run("ca", "server", "--ca", ca, "--host", "localhost", "--out", server)
    one_sentence(again, 2, "--out", "exists and is not replaced")
    one_sentence(admit(operator, out="request.json"), 2, "--out", "exists and is not replaced")
    assert {path: path.read_bytes() for path in operator.folder.rglob("*") if path.is_file()} == before


def test_names_for_the_time_after_a_row_follow_it_without_a_gap(operator: Operator) -> None:
    set_up(operator)
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    device = Pseudonyms(MemoryStore(), tenant="clinic", task="watch")
    for name, options in (("this", ()), ("next", ("--next-period",))):
        (operator.folder / name).write_bytes(device.prepare(count=1, entropy=os.urandom))
        assert admit(operator, name, "--period-days", "366", *options, out=f"{name}.json")[0] == 0
        answer = (operator.folder / f"{name}.json").read_bytes()
        device.install(answer, aggregator_key=AggregatorFiles.load(operator.config).signing_key().public_key())
    first, second = device.installed()
    assert first.period.begins_s <= time.time() < first.period.ends_s == second.period.begins_s


def test_a_request_admitted_twice_is_one_sentence_and_no_file(operator: Operator) -> None:
    set_up(operator)
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    (operator.folder / "request.json").write_bytes(make_request())
    assert admit(operator)[0] == 0
    one_sentence(admit(operator, out="second.json"), 1, "was admitted before", "--anew")
    assert not (operator.folder / "second.json").exists()


def test_an_admission_that_cannot_be_is_one_sentence(operator: Operator) -> None:
    folder = operator.folder
    (folder / "request.json").write_bytes(make_request())
    one_sentence(admit(operator), 3, "no database")
    operator.says("init", "CONFIG")
    one_sentence(admit(operator), 2, "--ca")
    operator.run("ca", "init", "--ca", str(folder / "ca"))
    one_sentence(admit(operator, "nothing.json"), 2, "REQUEST")
    one_sentence(admit(operator, "aggregator.toml"), 1, "not a pseudonym request")
    one_sentence(admit(operator), 1, "got one for clinic/watch", "covey-aggregator task list")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    one_sentence(admit(operator, out="request.json/answer.json"), 2, "--out")
    (folder / "ca" / "ca.key").chmod(0o644)
    one_sentence(admit(operator), 2, "chmod 600")
    (folder / "ca" / "ca.key").chmod(0o600)
    (folder / "ca" / "ca.pem").write_bytes((folder / "ca" / "ca.key").read_bytes())
    one_sentence(admit(operator), 1, "the CA")
    assert operator.run("device", "list", "CONFIG")[1] == ""
    one_sentence(operator.run("ca", "init", "--ca", str(folder / "b"), "--name", ""), 2, "--name")


def test_an_answer_whose_pseudonyms_the_database_refused_is_not_left_behind(operator: Operator) -> None:
    set_up(operator)
    operator.run("ca", "init", "--ca", str(operator.folder / "ca"))
    (operator.folder / "request.json").write_bytes(make_request())
    seen = []

    def full(connection: Connection) -> None:
        del connection
        if (operator.folder / "answer.json").exists():
            seen.append("the answer is written before the commit")
            raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    event.listen(Engine, "commit", full)
    try:
        one_sentence(admit(operator), 3, "database", "disk is full")
    finally:
        event.remove(Engine, "commit", full)
    assert seen
    assert not (operator.folder / "answer.json").exists()
    assert operator.run("device", "list", "CONFIG")[1] == ""
    assert admit(operator)[0] == 0
