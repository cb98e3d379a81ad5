"""Real recordings, replayed by a fleet of any size: each device is one real wrist, with a body and a watch of its own.

Devices are dealt out over the wrists of the people who are not held out. The first of each wrist replays it as it was
recorded; the others vary it (`wearer`). A window begins at a random sample of a recording of its label, so windows of
one device overlap in the long run: a simulated fleet says nothing about the privacy of the ten people behind it.

Recordings: D. Burns et al., arXiv 1802.01489 (`firmware_sim.watch_data`, which reads them; here there is no I/O).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from device_client.training import Records
from firmware_sim.errors import SettingsError
from firmware_sim.sensors.diary import Diary, Entries
from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.sensor import Float64, Int64, Recorded, Sensor
from firmware_sim.sensors.wearer import USUAL, Variation, Wearer, straight_wearer, warped_time, wearer_of, window_draws
from firmware_sim.watch_data import CHANNELS, LABELS, PEOPLE, Recording, all_wrists, windows_of
from fl_protocol.model_manifest import BundleManifest, InputSchema

HZ = 50.0


@dataclass(frozen=True)
class ReplaySensor(Sensor):
    """A fleet of people who were recorded.

    Args:
        recordings: of everybody (`load_recordings`).
        schema: what the model takes: windows of 6 channels at 50 Hz.
        diary: who records when.
        held_out_people: on no device.
        variation: how far devices of one wrist differ.
    """

    recordings: list[Recording]
    schema: InputSchema
    diary: Diary
    held_out_people: tuple[int, ...] = (9, 10)
    variation: Variation = USUAL
    _reels: list[Reel] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        wrists = [wrist for wrist in all_wrists() if wrist.person not in self.held_out_people]
        reels = [_reel([one for one in self.recordings if one.wrist == wrist]) for wrist in wrists]
        shortest = min(int(reel.lengths.min()) for reel in reels)
        if self.schema.shape[0] > shortest // 2:
            raise SettingsError(
                f'the model\'s windows have {self.schema.shape[0]} samples; kind = "replay" has recordings for up to '
                f'{shortest // 2}: use another model, or kind = "synthetic"'
            )
        object.__setattr__(self, "_reels", reels)

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """See `Sensor`."""
        entries = self.diary.entries(device, from_s, to_s)
        x = self._replayed(device, entries).astype(np.float32)
        return Recorded(entries.at_s, Records(x, entries.label.astype(np.int32)))

    def wearer(self, device: int) -> Wearer:
        """Who wears a device; the first of each wrist is the one who was recorded."""
        if device < len(self._reels):
            return straight_wearer(self.schema)
        return wearer_of(self.diary.seed, device, self.variation, self.schema)

    def held_out(self, count: int) -> Records:
        """Up to `count` of the disjoint windows of the people held out, as they were recorded."""
        samples = self.schema.shape[0]
        wrists = [wrist for wrist in all_wrists() if wrist.person in self.held_out_people]
        parts = [windows_of(self.recordings, wrist, samples=samples) for wrist in wrists]
        x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        order = stream(self.diary.seed, Purpose.TEST_SET).permutation(len(y))[:count]
        return Records(x[np.sort(order)], y[np.sort(order)])

    def _replayed(self, device: int, entries: Entries) -> Float64:
        """A wearer's windows, float64 [n, samples, channels]."""
        wearer, reel, samples = self.wearer(device), self._reels[device % len(self._reels)], self.schema.shape[0]
        names = entries.day.tolist(), entries.number.tolist()
        chance, jitter = window_draws(self.diary.seed, device, *names, self.schema.shape)
        moved = reel.played(entries.label, warped_time(wearer, chance[:, :2], samples), chance[:, 2], wearer)
        return wearer.measured(moved, chance[:, 3:6], jitter)


@dataclass(frozen=True)
class Reel:
    """All recordings of a wrist, end to end.

    Args:
        samples: float64 [samples, channels].
        begins, lengths: int64 [labels], in samples.
        means: float64 [labels, channels]: of each recording; mostly gravity.
    """

    samples: Float64
    begins: Int64
    lengths: Int64
    means: Float64

    def played(self, label: Int64, at: Float64, where: Float64, wearer: Wearer) -> Float64:
        """Windows of the labels' recordings, wider and faster as the wearer does it, [n, samples, channels].

        Args:
            label: int64 [n].
            at: of `warped_time`, [n, samples].
            where: in the recording a window begins, as a share of what is possible, [n].
            wearer: whose pace and reach are taken.
        """
        last = self.lengths[label] - 2.0
        at = at * np.minimum(1.0, last / at[:, -1])[:, None]  # somebody very fast: no further than there is
        position = at + ((last - at[:, -1]) * where)[:, None]
        left = np.floor(position).astype(np.int64)
        share = (position - left)[:, :, None]
        row = self.begins[label][:, None] + left
        x = self.samples[row] * (1 - share) + self.samples[row + 1] * share
        speed = np.gradient(at, axis=1)
        x[:, :, 3:] *= speed[:, :, None]  # rates of rotation rise with the tempo
        mean = self.means[label][:, None, :]
        wider: Float64 = mean + wearer.reach * (x - mean)
        return wider


def _reel(recordings: list[Recording]) -> Reel:
    """One wrist's recordings, of which there is one for each label."""
    ordered = sorted(recordings, key=lambda one: one.label)
    lengths = np.array([len(one.samples) for one in ordered], np.int64)
    return Reel(
        samples=np.concatenate([one.samples for one in ordered]).astype(np.float64),
        begins=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        means=np.stack([one.samples.mean(axis=0, dtype=np.float64) for one in ordered]),
    )


def require_replayable(manifest: BundleManifest, held_out_people: tuple[int, ...]) -> None:
    """Refuse a model that does not take the recordings, and people who do not exist.

    Raises:
        SettingsError: the text says what was expected and what came.
    """
    schema, names = manifest.input, manifest.label.names
    if schema.shape[1:] != (CHANNELS,) or schema.sampling_rate_hz != HZ or names != LABELS:
        raise SettingsError(
            f'sensors.kind = "replay": expected a model for windows of {CHANNELS} channels at {HZ:g} Hz with the '
            f"labels {', '.join(LABELS)}; this one takes {schema.shape} at {schema.sampling_rate_hz:g} Hz with the "
            f"labels {', '.join(names) or 'none'}: use such a model, or another kind"
        )
    if not held_out_people or not set(held_out_people) < set(PEOPLE):
        raise SettingsError(
            f"sensors.held_out: expected some but not all of {PEOPLE[0]} to {PEOPLE[-1]}, got {list(held_out_people)}"
        )
