"""From a signed manifest to what all parties of a secure round know, and whose keys it names. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec.structs import replace

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import discrete_gaussian_bound, skellam_bound
from fl_protocol.messages import RoundManifestMsg, SignedMsg, decode, encode
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.messages import HelperKeyMsg, SecureTermsMsg
from fl_protocol.secagg.parties import SecureRound
from fl_protocol.signing import verify
from fl_protocol.update_encoding import rotation_seed


@dataclass(frozen=True)
class HelperIdentity:
    """A helper as others pin it.

    Args:
        name: on the wire.
        operator: who runs it.
        key: its Ed25519 identity.
    """

    name: str
    operator: str
    key: Ed25519PublicKey


def manifest_digest(manifest: RoundManifestMsg) -> bytes:
    """What contributions to a round and sums of masks are bound to: all of its manifest but the two times.

    The times are the only thing that may change while a round is open: its deadline is moved after an outage, and both
    follow a clock that is set.

    Returns:
        SHA-256 of `covey v1 secure round`, a zero byte, and the manifest's encoding with both times 0.
    """
    timeless = replace(manifest, opened_s=0.0, deadline_s=0.0)
    return hashlib.sha256(b"covey v1 secure round\0" + encode(timeless)).digest()


def fixed_point_of(terms: SecureTermsMsg, length: int) -> FixedPoint:
    """How updates of this length become integers.

    Raises:
        ProtocolError: the modulus does not hold every possible sum, or a value is out of range.
    """
    try:
        return FixedPoint(
            length,
            l2_norm_clip=terms.l2_norm_clip,
            step=terms.step,
            most_updates=terms.most_updates,
            noise_bound=noise_bound(terms),
            rotates=terms.rotates,
            bits=terms.bits,
            clip_bit=terms.clip_bit,
        )
    except LocalMisuseError as error:
        raise ProtocolError(f"the round's terms: {error}") from error


def noise_bound(terms: SecureTermsMsg) -> int:
    """Largest magnitude of all noise in one number of the sum, in grid steps."""
    shares = terms.most_updates * skellam_bound(terms.device_noise_variance) if terms.device_noise_variance else 0
    sigma = terms.helper_noise_sigma
    return shares + (len(terms.helpers) * discrete_gaussian_bound(sigma) if sigma else 0)


def helper_keys(terms: SecureTermsMsg) -> dict[str, HelperKeyMsg]:
    """The keys that a manifest names, by helper, in its order; their signatures are not looked at.

    Raises:
        ProtocolError: malformed, or a helper is named twice.
    """
    keys = [decode(decode(signed, SignedMsg).payload, HelperKeyMsg) for signed in terms.helpers]
    if len({key.helper for key in keys}) < len(keys):
        raise ProtocolError(f"the manifest names a helper twice: {', '.join(key.helper for key in keys)}")
    return {key.helper: key for key in keys}


def verified_helpers(manifest: RoundManifestMsg, pinned: Mapping[str, HelperIdentity]) -> list[HelperIdentity]:
    """The helpers of a secure round, each with a key that its pinned identity has signed; runs at the device.

    Args:
        manifest: of an open secure round, its own signature verified.
        pinned: helpers that are trusted, by name.

    Raises:
        ProtocolError: a helper is not pinned, is named twice, goes by another operator, or its key is not its own or
            ends before the round.
    """
    if manifest.secure is None:
        raise ProtocolError("the manifest is of no open secure round")
    found = []
    for signed, key in zip(manifest.secure.helpers, helper_keys(manifest.secure).values(), strict=True):
        identity = pinned.get(key.helper)
        if identity is None:
            raise ProtocolError(f"the manifest names helper {key.helper}, which is not among the pinned ones")
        verify(signed, HelperKeyMsg, identity.key)
        if key.operator != identity.operator:
            raise ProtocolError(f"helper {key.helper}: expected operator {identity.operator}, got {key.operator}")
        if key.not_after_s < manifest.deadline_s:
            raise ProtocolError(f"the key of helper {key.helper} ends before the round's deadline")
        found.append(identity)
    return found


def secure_round(manifest: RoundManifestMsg) -> SecureRound:
    """What every party computes with; whether its helpers are to be trusted is `verified_helpers`' question.

    Raises:
        ProtocolError: the manifest is of no open secure round, or its terms do not fit together.
    """
    if manifest.secure is None:
        raise ProtocolError("the manifest is of no open secure round")
    return SecureRound(
        tenant=manifest.tenant,
        task=manifest.task,
        number=manifest.round,
        manifest_digest=manifest_digest(manifest),
        fixed_point=fixed_point_of(manifest.secure, manifest.update_length),
        prg=manifest.secure.prg,
        rotation_seed=rotation_seed(manifest.model_digest, manifest.round),
        minimum_cohort=manifest.minimum_cohort,
        helpers={name: key.recipient for name, key in helper_keys(manifest.secure).items()},
    )
