"""Names whose TLS keys only a TPM can use: a device joins two real mosquittos with them, and nobody else can.

The TPM is in software; to the device it is one like another. Everything of the device runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from device_client.adapters.tpm2_tls_keys import Tpm2TlsKeys
from device_client.assembly import DeviceFiles
from device_client.joining.joiner import kept_state
from device_client.pseudonyms import Pseudonyms
from device_client.tls_keys import SoftwareTlsKeys
from firmware_sim.mosquitto_broker import find_mosquitto
from fl_protocol.adapters.tpm2_command import PEM_BEGINS
from fl_protocol.joining import parse_token
from fl_protocol.renewal_proof import signed_proof
from tests.contracts.brokers import WITHIN_S
from tests.contracts.software_tpm import SoftwareTpm, need_tpm, software_tpm
from tests.system.clinic import BUNDLES, ROOT, TASK, TENANT, Clinic, Watch, running_clinic

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
CONFIG = """[device]
store = "store"
store_key = "store.key"
tls_keys = "{tls_keys}"

[privacy]
epsilon = 3.0
delta = 1e-5
"""
SOFTWARE = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere", "TPM2OPENSSL_TCTI": "tabrmd:bus_type=session"}
"""Where there is no TPM."""


@dataclass
class Wearer:
    """A device's folder and its command."""

    folder: Path
    clinic: Clinic

    def run(self, environment: dict[str, str], *arguments: str, given: str = "") -> tuple[int, str]:
        """Exit code of a command, and what it said."""
        command, *rest = arguments
        done = subprocess.run(
            [sys.executable, "-m", "device_client.cli", command, "--config", "device.toml", *rest],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
            input=given,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def enroll(self, environment: dict[str, str]) -> tuple[int, str]:
        at = ("--config", "aggregator.toml", "--claim", "claim.json", "--owner", "ward-3", "--quota", "100000")
        token = self.clinic.command("enroll-token", "create", TASK, "--count", "1", *at).strip()
        assert parse_token(token)
        files = ("--claim", str(self.clinic.folder / "claim.json"), "--bundle", "watch.covey", "--count", "2")
        return self.run(environment, "enroll", *files, "--token", "-", given=token)

    def findings(self, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
        """What doctor finds of the study, by check."""
        _, said = self.run(environment, "doctor", "--json")
        rows, _ = json.JSONDecoder().raw_decode(said, said.index("[\n"))
        return {row["check"]: row for row in rows}

    def tls_keys(self) -> list[bytes]:
        """What the store holds as TLS keys."""
        with closing(DeviceFiles.load(self.folder / "device.toml").open_store()) as store:
            return [one.tls_key for one in Pseudonyms(store, tenant=TENANT, task=TASK).installed()]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    need_tpm()
    with running_clinic(tmp_path_factory.mktemp("clinic")) as clinic:
        yield clinic


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareTpm]:
    with software_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm


def wearer_in(folder: Path, clinic: Clinic, *, tls_keys: str = "tpm2") -> Wearer:
    folder.mkdir()
    shutil.copy(BUNDLES / "watch_features.covey", folder / "watch.covey")
    (folder / "device.toml").write_text(CONFIG.format(tls_keys=tls_keys))
    wearer = Wearer(folder, clinic)
    code, said = wearer.run({}, "init")
    assert code == 0, said
    return wearer


def readable_keys(wearer: Wearer) -> list[bytes]:
    """TLS keys of a device that somebody who reads its store could use elsewhere."""
    found = []
    for key in wearer.tls_keys():
        for load in (load_pem_private_key, load_der_private_key):
            try:
                load(key, None)
            except (ValueError, TypeError):
                continue
            found.append(key)
    return found


def test_a_device_joins_and_connects_and_another_machine_with_all_its_files_does_not(
    clinic: Clinic, tpm: SoftwareTpm, tmp_path: Path
) -> None:
    wearer = wearer_in(tmp_path / "device", clinic)
    code, said = wearer.enroll(tpm.environment)
    assert code == 0, said
    keys = wearer.tls_keys()
    assert len(set(keys)) == 2
    assert all(key.startswith(PEM_BEGINS) for key in keys)
    assert readable_keys(wearer) == []
    assert wearer.run({}, "consent", "grant", TASK)[0] == 0
    found = wearer.findings(tpm.environment)
    assert (found["certificate"]["verdict"], found["broker"]["verdict"]) == ("ok", "ok"), found
    # The whole folder, key of the store and all, beside another TPM; and where there is none.
    with software_tpm(tmp_path / "other") as other:
        stolen = wearer.findings(other.environment)
    for without in (stolen, wearer.findings(SOFTWARE)):
        assert without["certificate"]["verdict"] == without["broker"]["verdict"] == "problem", without
        assert "the TPM" in without["certificate"]["found"]
    # And back: nothing was spoilt.
    assert wearer.findings(tpm.environment)["broker"]["verdict"] == "ok"


def test_who_has_all_its_files_and_not_its_tpm_gets_no_further_names(
    clinic: Clinic, tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renewal key is in the store; with it, and TLS keys in software, one place after the other could be taken."""
    wearer = wearer_in(tmp_path / "device", clinic)
    code, said = wearer.enroll(tpm.environment)
    assert code == 0, said
    with closing(DeviceFiles.load(wearer.folder / "device.toml").open_store()) as store:
        state, names = kept_state(store, f"{TENANT}/{TASK}"), Pseudonyms(store, tenant=TENANT, task=TASK).installed()
    assert state is not None
    assert state.membership is not None
    thief = Watch(clinic)
    thief.renewal = Ed25519PrivateKey.from_private_bytes(state.membership.renewal_key)
    thief.enrolment = state.membership.enrolment
    answer = thief.ask_with(thief.prepared(None))
    assert answer.outcome == "refused"
    assert "signed by a TLS key" in answer.detail
    made_up = SoftwareTlsKeys().make(os.urandom).key
    asked = {"tenant": TENANT, "task": TASK, "enrolment": thief.enrolment}
    for one in names:
        proof = signed_proof(one.id, made_up, names=thief.names.prepare(entropy=os.urandom), **asked)
        answer = thief.ask_with(thief.prepared(None, proof=proof))
        assert answer.outcome == "refused"
        assert f"not signed by the TLS key of {one.id}" in answer.detail
    # With the TPM, and nothing else changed, it is granted.
    for name, value in tpm.environment.items():
        monkeypatch.setenv(name, value)
    own = Tpm2TlsKeys().load(names[-1].tls_key)
    proof = signed_proof(names[-1].id, own, names=thief.names.prepare(entropy=os.urandom), **asked)
    assert thief.ask_with(thief.prepared(None, proof=proof)).outcome == "renewed"


def test_without_a_tpm_nobody_joins_and_it_is_not_done_in_software(clinic: Clinic, tmp_path: Path) -> None:
    wearer = wearer_in(tmp_path / "device", clinic)
    code, said = wearer.enroll(SOFTWARE)
    assert code != 0
    assert "the TPM" in said
    assert "is there a TPM" in said
    assert wearer.tls_keys() == []


def test_keys_in_software_would_be_seen(clinic: Clinic, tmp_path: Path) -> None:
    wearer = wearer_in(tmp_path / "device", clinic, tls_keys="software")
    code, said = wearer.enroll({})
    assert code == 0, said
    assert len(readable_keys(wearer)) == 2
