"""What it costs a helper to know devices by their certificates: microseconds an update, verified and remembered.

A list of devices that go by pseudonyms, each with a certificate of one CA, as helpers check it before they open a seed
(`aggregator.helper.known_devices`): by a helper that has seen none of them (cold), and by one that has seen all
(remembered). Beside it what a helper does for every update in any case, one thing after the other: verify the signature
of its contribution, and open a seed sealed with hybrid keys; and the one ECDSA verification that no certificate can do
without. Steps take turns; a figure is the median over turns of processor time.

    python -m benchmarks.known_devices
    python -m benchmarks.known_devices --json
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.certificates import certify, make_ca
from aggregator.helper.answering import Question, Study
from aggregator.helper.known_devices import KnownDevices
from benchmarks.command import parser
from benchmarks.secure_case import Case, bare_openings, bare_verifications, case_of, update_id, update_of
from benchmarks.timing import Lengths, Step, alternate, cpu_name, timed
from device_client.adapters.system_entropy import system_entropy
from fl_protocol.client_certificates import key_info
from fl_protocol.enrolment import periods_from, pseudonym_id
from fl_protocol.messages import encode
from fl_protocol.secagg.credentials import credential_of
from fl_protocol.secagg.messages import UnmaskEntryMsg
from fl_protocol.secagg.parties import Sender, contribute, entry_at
from fl_protocol.secagg.parties import included_digest as digest_of

NOW_S = 1_800_000_000.0
NUMBERS = 100
CA = make_ca("covey clinic", now_s=NOW_S)
PINNED = x509.load_pem_x509_certificate(CA.certificate)
(PERIOD,) = periods_from(NOW_S, period_days=30, count=1)


def main() -> None:
    """Measure, and print."""
    command = parser("known_devices", __doc__)
    command.add_argument("--devices", type=int, default=500, help="on the list (default 500)")
    command.add_argument("--repeats", type=int, default=9, help="turns, at least 5 (default 9)")
    arguments = command.parse_args()
    if arguments.repeats < 5 or arguments.devices < 2:
        command.error("--repeats: at least 5, or the median says little; --devices: at least 2")
    result = measure(arguments.devices, repeats=arguments.repeats)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for key, value in result.items():
        print(f"{key:<28}{value}")


def measure(devices: int, *, repeats: int) -> dict[str, Any]:
    """All figures; times in microseconds of one update."""
    case = case_of(devices, NUMBERS)
    question = question_of(case, devices)
    study = Study(case.terms.tenant, Ed25519PrivateKey.generate().public_key(), cas=(PINNED,), allow_listed=False)
    seen, entry = KnownDevices(study), question.entries[0]
    seen.keys(question, listed={}, now_s=NOW_S)
    steps: dict[str, Step] = {
        "cold_us": lambda: KnownDevices(study).keys(question, listed={}, now_s=NOW_S),
        "remembered_us": lambda: seen.keys(question, listed={}, now_s=NOW_S),
        "bare_certificate_us": lambda: bare_certificates(entry, devices),
        "bare_contribution_us": lambda: bare_verifications(case, entry, devices),
        "bare_opening_us": lambda: bare_openings(case, entry, question.devices[0], devices),
    }
    found = alternate({name: timed(step, time.process_time) for name, step in steps.items()}, Lengths(repeats, 1))
    return {
        "devices": devices,
        **{name: round(1000 * statistics.median(times) / devices, 2) for name, times in found.items()},
        "entry_bytes": len(encode(entry)),
        "certificate_bytes": len(certificate_in(entry)),
        "cpu": cpu_name(),
    }


def question_of(case: Case, devices: int) -> Question:
    """What a helper is asked about devices that have a name and a certificate each, and one update between them."""
    senders = [sender_of(case, index) for index in range(devices)]
    body = contribute(
        case.terms, update_of(NUMBERS), np.zeros(NUMBERS, np.int64), sender=senders[0], entropy=system_entropy
    )
    entry = entry_at(body, 0)
    entries = tuple(
        UnmaskEntryMsg(contribution=entry.contribution, seed=entry.seed, credential=one.credential) for one in senders
    )
    (recipient, *_) = case.terms.helpers.values()
    return Question(
        terms=case.terms,
        opened_s=NOW_S,
        noise_sigma=0.0,
        recipient=recipient,
        entries=entries,
        devices=tuple(one.device for one in senders),
        included_digest=digest_of(one.update_id for one in senders),
    )


def sender_of(case: Case, index: int) -> Sender:
    """A device with a pseudonym of this period; all have one signing key, which no check here asks about."""
    number = int.from_bytes(hashlib.sha256(f"TLS {index}".encode()).digest()[:31], "big")
    tls = ec.derive_private_key(number + 1, ec.SECP256R1()).public_key()
    signing = case.device_key.public_key()
    name = pseudonym_id(
        tenant=case.terms.tenant, task=case.terms.task, signing_key=signing.public_bytes_raw(), tls_key=key_info(tls)
    )
    certificate = certify(CA, name, tls, not_before_s=PERIOD.not_before_s, not_after_s=PERIOD.not_after_s)
    return Sender(name, update_id(name), case.device_key, credential_of(signing, certificate))


def certificate_in(entry: UnmaskEntryMsg) -> bytes:
    """An entry's certificate, DER."""
    if entry.credential is None:
        raise ValueError("expected an entry with a credential, got one without")
    return entry.credential.certificate


def bare_certificates(entry: UnmaskEntryMsg, count: int) -> None:
    """So many verifications of a certificate's signature by the CA's key, and nothing else."""
    certificate = x509.load_der_x509_certificate(certificate_in(entry))
    for _ in range(count):
        certificate.verify_directly_issued_by(PINNED)


if __name__ == "__main__":
    main()
