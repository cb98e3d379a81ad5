"""People who never were: periodic motions that differ by label, done by each person in their own way. Pure.

A label is a motion with a frequency, three harmonics on every channel and a posture, drawn once and for all, so that a
model that was trained in one run makes sense in the next. A person does it at their own tempo and size, with
deviations of their own in every harmonic (`Variation.style`), and with a watch of their own (`wearer`).

Frequencies, sizes and deviations are our estimate: rhythmic movements of limbs at 0.7 to 1.3 Hz. It is a task to
learn, not a model of the human body, and nothing about people follows from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from device_client.training import Records
from firmware_sim.errors import SettingsError
from firmware_sim.sensors.diary import Diary, Entries
from firmware_sim.sensors.draws import Purpose, stream
from firmware_sim.sensors.sensor import Float64, Int64, Recorded, Sensor
from firmware_sim.sensors.wearer import USUAL, Variation, Wearer, warped_time, wearer_of, window_draws
from fl_protocol.model_manifest import BundleManifest, InputSchema

HARMONICS = 3
SLOWEST_HZ, FASTEST_HZ = 0.7, 1.3
SIZE = {"g": 0.3, "rad/s": 1.5}
"""Standard deviation of a harmonic's coefficient by unit; 1 otherwise."""
FIRST_HELD_OUT = 2**40
"""Number of the first person who is on no device; devices are far below."""
WINDOWS_OF_HELD_OUT = 20
"""Windows of each person in the test set."""
DISTINCT = 0.25
"""How far labels differ from what they have in common, as a share of the motion's size."""
_LABELS_SEED = 2_026


@dataclass(frozen=True)
class SyntheticSensor(Sensor):
    """A fleet of synthetic persons.

    Args:
        schema: what the model takes: windows [samples, channels] over time.
        diary: who records when; it says how many labels there are.
        variation: how far persons differ.
    """

    schema: InputSchema
    diary: Diary
    variation: Variation = USUAL
    _motions: Motions = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_motions", _motions_of(self.diary.labels, self.schema))

    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        """See `Sensor`."""
        entries = self.diary.entries(device, from_s, to_s)
        return Recorded(entries.at_s, self._made(device, entries))

    def wearer(self, person: int) -> Wearer:
        """Who wears a device."""
        return wearer_of(self.diary.seed, person, self.variation, self.schema)

    def held_out(self, count: int) -> Records:
        """`count` windows, 20 each of persons who are on no device; all labels equally often."""
        parts = []
        for first in range(0, count, WINDOWS_OF_HELD_OUT):
            number = np.arange(min(WINDOWS_OF_HELD_OUT, count - first), dtype=np.int64)
            entries = Entries(number.astype(np.float64), (first + number) % self.diary.labels, number * 0, number)
            parts.append(self._made(FIRST_HELD_OUT + first // WINDOWS_OF_HELD_OUT, entries))
        x = [np.zeros((0, *self.schema.shape), np.float32)] + [part.x for part in parts]
        return Records(np.concatenate(x), np.concatenate([np.zeros(0, np.int32)] + [part.y for part in parts]))

    def _made(self, person: int, entries: Entries) -> Records:
        """A person's windows."""
        wearer, samples = self.wearer(person), self.schema.shape[0]
        names = entries.day.tolist(), entries.number.tolist()
        chance, jitter = window_draws(self.diary.seed, person, *names, self.schema.shape)
        time_s = warped_time(wearer, chance[:, :2], samples) / self.schema.sampling_rate_hz
        own = self._motions.of_person(stream(self.diary.seed, Purpose.STYLE, person), self.variation.style)
        motion = own.at(entries.label, time_s, chance[:, 2], wearer.reach)
        x = wearer.measured(motion, chance[:, 3:6], jitter).astype(np.float32)
        return Records(x, entries.label.astype(np.int32))


@dataclass(frozen=True)
class Motions:
    """What is done for each label.

    Args:
        hz: frequency, float64 [labels].
        posture: what a watch at rest measures, float64 [labels, channels].
        waves: coefficients of cosine and sine of each harmonic, float64 [labels, 2 · `HARMONICS`, channels].
    """

    hz: Float64
    posture: Float64
    waves: Float64

    def of_person(self, random: np.random.Generator, style: float) -> Motions:
        """The same as one person does it."""
        size = np.sqrt(np.mean(self.waves**2, axis=(0, 1)))
        return Motions(self.hz, self.posture, self.waves + style * size * random.normal(size=self.waves.shape))

    def at(self, label: Int64, time_s: Float64, phase: Float64, reach: float) -> Float64:
        """Windows [n, samples, channels] of labels [n] at moments [n, samples], begun at a phase [n] of the period."""
        angle = 2 * math.pi * (self.hz[label][:, None] * time_s + phase[:, None])
        angles = angle[:, :, None] * np.arange(1, HARMONICS + 1)
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=2)
        moved: Float64 = self.posture[label][:, None, :] + reach * (waves @ self.waves[label])
        return moved


def _motions_of(labels: int, schema: InputSchema) -> Motions:
    """The motions of a model's labels, the same in every run."""
    channels = len(schema.units)
    random = stream(_LABELS_SEED, Purpose.STYLE, labels, channels)
    hz = random.uniform(SLOWEST_HZ, FASTEST_HZ, labels)
    size = np.array([SIZE.get(unit, 1.0) for unit in schema.units])
    falling = 1 / np.tile(np.arange(1.0, HARMONICS + 1), 2)[:, None]
    waves = _alike(random, labels, (2 * HARMONICS, channels)) * falling * size
    upwards = _alike(random, labels, (channels,)) * [unit == "g" for unit in schema.units]
    length = np.linalg.norm(upwards, axis=1, keepdims=True)
    return Motions(hz, upwards / np.where(length > 0, length, 1.0), waves)


def _alike(random: np.random.Generator, labels: int, shape: tuple[int, ...]) -> Float64:
    """Normal numbers that labels have mostly in common, [labels, *shape]."""
    alike: Float64 = random.normal(size=shape) + DISTINCT * random.normal(size=(labels, *shape))
    return alike


def require_synthesisable(manifest: BundleManifest) -> None:
    """Refuse a model whose examples are not windows of a signal over time with one of several labels.

    Raises:
        SettingsError: the text says what was expected and what came.
    """
    schema, label = manifest.input, manifest.label
    if len(schema.shape) != 2 or schema.sampling_rate_hz <= 0 or label.kind != "class":
        raise SettingsError(
            'sensors.kind = "synthetic": expected a model for windows [samples, channels] over time that '
            f"tells classes apart; this one takes {schema.shape} at {schema.sampling_rate_hz:g} Hz and predicts "
            f'{label.kind}: use such a model, or kind = "none"'
        )
