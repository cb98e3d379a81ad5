"""A renewal is signed by a TLS key of a name that was granted last, over exactly what is asked for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from msgspec.structs import replace

from device_client.pseudonyms import Pseudonyms
from firmware_sim.seeded_entropy import SeededEntropy
from fl_protocol import renewal_proof
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from fl_protocol.errors import ProtocolError
from tests.device_client.ports import MemoryStore
from tests.enrolments import AGGREGATOR, TASK, TENANT, Office, broken_copy

ASKED: dict[str, Any] = {"tenant": TENANT, "task": TASK, "enrolment": "e1", "names": b"these"}


def granted_to(seed: str) -> tuple[Pseudonyms, PseudonymAnswer]:
    """Names of a device, and the answer that they came with."""
    names = Pseudonyms(MemoryStore(), tenant=TENANT, task=TASK)
    answer = Office().admit(names.prepare(count=2, entropy=SeededEntropy(seed)))
    names.install(answer, aggregator_key=AGGREGATOR.public_key())
    return names, decode_file(answer, PseudonymAnswer)


def check_all_of_it_counts(module: ModuleType) -> None:
    names, granted = granted_to("a")
    others, _ = granted_to("b")
    first, last = names.installed()
    proof = module.signed_proof(first.id, names.tls_key(first), **ASKED)
    module.check_proof(proof, granted, **ASKED)
    wrong = [
        (None, ASKED, "got one without"),
        *((proof, ASKED | {what: "other"}, "is not signed by") for what in ("tenant", "task", "enrolment")),
        (proof, ASKED | {"names": b"others"}, "is not signed by"),
        (replace(proof, name=last.id), ASKED, "is not signed by"),
        (replace(proof, name=others.installed()[0].id), ASKED, "names that were granted last"),
        (replace(proof, signature=proof.signature[:-1] + bytes([proof.signature[-1] ^ 1])), ASKED, "is not signed by"),
        (replace(proof, signature=b"rubbish in place of DER"), ASKED, "is not signed by"),
    ]
    for one, asked, reason in wrong:
        with pytest.raises(ProtocolError) as caught:
            module.check_proof(one, granted, **asked)
        assert reason in str(caught.value)


def test_all_of_it_counts() -> None:
    check_all_of_it_counts(renewal_proof)


@pytest.mark.parametrize(
    "change",
    [
        ("    except InvalidSignature:\n        raise", "    except InvalidSignature:\n        return\n        raise"),
        ("[tenant, task, enrolment, hashlib", "[task, enrolment, hashlib"),
        ("[tenant, task, enrolment, hashlib", "[tenant, enrolment, hashlib"),
        ("[tenant, task, enrolment, hashlib", "[tenant, task, hashlib"),
        ("hashlib.sha256(names).digest()", "b''"),
        ("    if proof is None:\n        raise", "    if proof is None:\n        return\n        raise"),
        (
            "for one in granted.certificates}.get(proof.name)",
            "for one in granted.certificates}.get(proof.name, granted.certificates[0].certificate)",
        ),
    ],
)
def test_a_check_that_leaves_something_out_is_caught(change: tuple[str, str]) -> None:
    # What signs leaves out the same, or nothing would be accepted at all.
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_all_of_it_counts(broken_copy("fl_protocol.renewal_proof", change))
