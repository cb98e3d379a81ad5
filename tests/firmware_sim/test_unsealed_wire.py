"""`wire = "off"`: the same study without seals and signatures; nobody outside the simulator can be talked into it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

import aggregator.assembly
import device_client.assembly
from aggregator.ingest import OPENER, Opener, verify_header
from device_client.device_ports import DevicePorts
from device_client.downloads import Download
from device_client.work_vectors import IN_ENTRY
from firmware_sim.scenario.loading import load_scenario
from firmware_sim.unsealed_wire import NoSigner, NoVerifier, unsealed, unsealed_update
from fl_protocol.errors import ConfigError, ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.sealing import open_update, seal_update
from fl_protocol.signing import sign, verify
from tests.firmware_sim.fleet.small_fleets import BASE, ran, scenario_file
from tests.fl_protocol import examples

KEY = examples.round_key("x25519")
DEVICE = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
UPDATE_ID = b"\x0b" * 16
REAL = {
    "devices": 3,
    "fidelity": "real",
    "history_days": 0.5,
    "sensors": {"kind": "synthetic"},
    "task": {**BASE["task"], "rounds": 2, "goal": 3, "minimum_cohort": 2},
}


def manifest() -> RoundManifestMsg:
    """Of an open round whose updates are sealed to `KEY`."""
    return examples.manifest("x25519", recipient=KEY.recipient())


VALUES = np.array([1.0, 2.0], "<f4").tobytes()


def envelope() -> bytes:
    """An update that was not sealed."""
    body = UpdateBodyMsg(num_parameters=2, values=VALUES)
    return unsealed_update(body, manifest=manifest(), device="w1", update_id=UPDATE_ID)[0]


def checked(opener: Opener) -> None:
    """What an aggregator does first with that update."""
    tenant, key = manifest().tenant, DEVICE.public_key()
    verify_header(envelope(), tenant=tenant, device="w1", device_key=key, update_id=UPDATE_ID, opener=opener)


def test_the_models_are_the_same_with_and_without_seals(tmp_path: Path) -> None:
    digests = {}
    for wire in ("on", "off"):
        run = ran(tmp_path / wire, wire=wire, **REAL)
        digests[wire] = [event.detail for event in run.of("round_committed")]
    assert digests["on"] == digests["off"]
    assert len(set(digests["on"])) == 2  # something was learned in each round


def test_a_real_aggregator_refuses_what_was_not_signed() -> None:
    with pytest.raises(RefusedError) as refused:
        checked(OPENER)
    assert refused.value.reason is RefusalReason.BAD_SIGNATURE
    checked(unsealed({}))  # the simulator's own takes it: nothing else was wrong with it


def test_a_real_aggregator_does_not_open_what_was_not_sealed() -> None:
    outer = decode(envelope(), UpdateEnvelopeMsg)
    header = decode(outer.header, UpdateHeaderMsg)
    with pytest.raises(ProtocolError):
        open_update(header, outer.sealed, KEY)
    handed = {UPDATE_ID: np.frombuffer(VALUES, np.uint8)}
    assert bytes(unsealed(handed).open_body(header, outer.sealed, KEY).values) == VALUES


def test_only_what_was_handed_over_is_opened() -> None:
    outer = decode(envelope(), UpdateEnvelopeMsg)
    header = decode(outer.header, UpdateHeaderMsg)
    short, another = np.frombuffer(VALUES[:4], np.uint8), replace(header, update_id=b"\x0c" * 16)
    for handed, named in ({}, header), ({UPDATE_ID: short}, header), ({another.update_id: short}, another):
        with pytest.raises(ProtocolError):
            unsealed(handed).open_body(named, outer.sealed, KEY)


def test_a_real_device_refuses_a_manifest_that_was_not_signed() -> None:
    unsigned = sign(manifest(), NoSigner())
    with pytest.raises(ProtocolError):
        verify(unsigned, RoundManifestMsg, DEVICE.public_key())
    assert verify(unsigned, RoundManifestMsg, NoVerifier()) == manifest()
    with pytest.raises(ProtocolError):  # nor does a simulated one take what somebody signed after all
        verify(sign(manifest(), DEVICE), RoundManifestMsg, NoVerifier())


def chosen_elsewhere(source: str, call: str, keyword: str) -> bool:
    """Whether a module hands this keyword to a call: then something else than the default could be chosen there."""
    calls = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Call)]
    mine = [one for one in calls if getattr(one.func, "id", "") == call]
    assert mine, f"there is no call of {call} any more; this test looks at nothing"
    return any(given.arg in {keyword, None} for one in mine for given in one.keywords)


def test_no_configuration_and_no_message_makes_a_device_or_an_aggregator_do_without() -> None:
    device, service = (Path(str(one.__file__)).read_text() for one in (device_client.assembly, aggregator.assembly))
    for port in ("sealer", "vectors", "downloads"):
        assert not chosen_elsewhere(device, "DevicePorts", port)
    assert not chosen_elsewhere(service[: service.index("def make_service")], "make_service", "opener")
    assert (DevicePorts.sealer, DevicePorts.vectors, DevicePorts.downloads) == (seal_update, IN_ENTRY, Download)
    careless = device.replace("DevicePorts(", "DevicePorts(sealer=chosen(config), ", 1)
    assert chosen_elsewhere(careless, "DevicePorts", "sealer")  # the search finds what it is for


def test_masked_updates_and_kept_ones_need_their_seals(tmp_path: Path) -> None:
    task = {**BASE["task"], "rule": {"name": "median"}}
    with pytest.raises(ConfigError, match=r"line \d+: wire: off goes with the engine open and the rule mean only"):
        load_scenario(scenario_file(tmp_path, wire="off", task=task))
