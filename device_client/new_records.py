"""Whether there are enough new records to take part: decided on a noisy count, and charged. Pure given its ports.

That a device takes part can be seen on the wire, so a rule on the exact number of records would tell the world about
one of them. The number is compared after Gaussian noise (sensitivity 1: one record more or less) and the comparison is
charged like a release, whatever it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from device_client.ledger import PrivacyLedger
from device_client.ports import Store
from fl_protocol.integer_noise import Entropy, discrete_gaussian
from fl_protocol.messages import RoundManifestMsg


@dataclass(frozen=True)
class NewRecords:
    """The wearer's rule for one study.

    Args:
        minimum: records wanted since the device last took part.
        noise: standard deviation of what is added to the count, in records.
        appended: how many records were ever stored.
        store, name: where the count at the last participation is kept.
    """

    minimum: int
    noise: float
    appended: Callable[[], int]
    ledger: PrivacyLedger
    entropy: Entropy
    store: Store
    name: str

    def problem(self, manifest: RoundManifestMsg, *, study: str, now_s: float) -> str:
        """Why they are not enough for a round, in words; empty when they are.

        Raises:
            BudgetSpentError: the count, and the round after it, cannot be charged any more; nothing was charged.
            StoreError: the disk did not take the charge.
        """
        # Security: the charge is durable before the count is looked at.
        self.ledger.reserve_count(
            task=study,
            round_number=manifest.round,
            plan=manifest.plan,
            noise_multiplier=self.noise,
            now_s=now_s,
            latest_s=manifest.deadline_s,
            earliest_s=manifest.opened_s,
        )
        new = self.appended() - self._at_last_participation()
        noisy = new + int(discrete_gaussian(self.noise, 1, self.entropy)[0])
        if noisy >= self.minimum:
            return ""
        return f"about {max(0, noisy)} new records (counted with noise), {self.minimum} are wanted"

    def took_part(self) -> None:
        """Count from here on. Raises StoreError."""
        self.store.write(self.name, self.appended().to_bytes(8, "little"))

    def _at_last_participation(self) -> int:
        raw = self.store.read(self.name)
        return int.from_bytes(raw, "little") if raw is not None else 0
