"""What a device brings that goes by a pseudonym: what it costs, and who reads the same in it."""

from __future__ import annotations

import numpy as np
from cryptography import x509

from aggregator.certificates import KeyPair, make_ca
from fl_protocol.messages import encode
from fl_protocol.sealing import round_key_bytes, seal_update
from fl_protocol.secagg.credentials import certified_device
from fl_protocol.secagg.messages import HelperKeyMsg
from fl_protocol.secagg.parties import Sender, contribute, entry_for
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import sign
from tests.aggregator.helper.pseudonymous import CA, PERIOD, TASK, TENANT, Named, admitted
from tests.fl_protocol.examples import AGGREGATOR_KEY, manifest, round_key, secure_terms
from tests.fl_protocol.secagg.rounds import seeded

KEM = "mlkem768-x25519"


def fixed_bytes(one: Named, *, helpers: int = 3) -> tuple[int, int]:
    """Of an update with hybrid keys, all that is not the masked vector; and of a list, what one update takes."""
    assert round_key_bytes(KEM) == 96
    keys = [
        HelperKeyMsg(
            helper=f"helper-{index}",
            operator=f"operator-{index}",
            recipient=round_key(KEM, seed=index).recipient(),
            not_after_s=2e6,
        )
        for index in range(helpers)
    ]
    terms = secure_terms(bits=32, helpers=tuple(sign(key, AGGREGATOR_KEY) for key in keys))
    opened = manifest(KEM, engine="secure", num_parameters=8, secure=terms)
    sender = Sender(one.name, bytes(16), one.signing_key, one.credential)
    body = contribute(
        secure_round(opened), np.zeros(8, np.float32), np.zeros(8, np.int64), sender=sender, entropy=seeded("size")
    )
    envelope = seal_update(body, manifest=opened, device=one.name, update_id=bytes(16), signing_key=one.signing_key)
    return len(envelope) - len(body.masked), len(encode(entry_for(secure_round(opened), body, "helper-0")))


def test_an_update_stays_below_6_kb_beside_its_vector() -> None:
    update, entry = fixed_bytes(admitted("size"))
    bare_update, bare_entry = fixed_bytes(Named(admitted("size").name, admitted("size").signing_key, None))
    assert update < 6000
    assert entry < 2200
    # ECDSA signatures in certificates are a byte or two longer or shorter.
    assert 550 < update - bare_update == entry - bare_entry < 600


def test_the_longest_names_fit_into_a_credential() -> None:
    ca: KeyPair = make_ca("c" * 64, now_s=0.0)
    one = admitted("long", ca=ca, tenant="t" * 64, task="u" * 64)
    assert one.credential is not None
    encode(one.credential)
    found = certified_device(
        one.credential,
        tenant="t" * 64,
        task="u" * 64,
        device=one.name,
        cas=[x509.load_pem_x509_certificate(ca.certificate)],
    )
    assert found.period == PERIOD


def test_a_helper_reads_the_period_and_key_that_were_admitted() -> None:
    one = admitted("honest")
    assert one.credential is not None
    cas = [x509.load_pem_x509_certificate(CA.certificate)]
    found = certified_device(one.credential, tenant=TENANT, task=TASK, device=one.name, cas=cas)
    assert found.signing_key == one.signing_key.public_key()
    assert found.period == PERIOD
