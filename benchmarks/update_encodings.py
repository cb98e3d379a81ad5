"""What smaller updates and smaller downloads cost in accuracy: bytes a round and accuracy on people never trained on.

Every arm is the same federated training with another encoding of the updates (`fl_protocol.update_encoding`) or of the
model on its way down (`fl_protocol.model_delta`). Training, noise, error feedback, sealing and the server's optimiser
are the code that runs on devices and at the aggregator; only the transport is left out. Bytes up are those of a whole
sealed and signed update with the default recipient key; bytes down are those of the model or its delta.

Noise and batches come from a seeded generator here, the same draws for every arm, so that arms differ by their encoding
alone; devices take them from the operating system. Accuracy is that of the mean of the second half of the versions, the
mean over folds of people left out. Times are per vector, the median over interleaved blocks, of this machine as it was.

    python -m benchmarks.update_encodings                  # about six minutes on one core
    python -m benchmarks.update_encodings --json
    python -m benchmarks.update_encodings --folds 5        # everybody is left out once: about ten minutes
    python -m benchmarks.update_encodings --rounds 5       # a quick look; the accuracy says nothing
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from aggregator.server_optimisers import ServerOptimiser, initial_state, step
from benchmarks.command import parser
from benchmarks.timing import Lengths, alternate, cpu_name, timed
from device_client.accounting import noise_multiplier_for
from device_client.error_feedback import ErrorFeedback
from device_client.training import Records, evaluate, train_locally
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.watch_data import Wrist, all_wrists, default_cache, load_recordings, windows_of
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import EncodingName, RoundManifestMsg, TrainingPlanMsg, UpdateBodyMsg
from fl_protocol.model_delta import DeltaEncoding, make_delta
from fl_protocol.sealing import RoundKey, round_key_bytes, seal_update
from fl_protocol.signing import public_key_from_hex
from fl_protocol.update_encoding import decode_values, encode_values, open_values, rotation_seed

Float32 = NDArray[np.float32]

FOLDS = ((9, 10), (1, 2), (5, 6), (3, 4), (7, 8))
EPSILON, DELTA = 3.0, 1e-5
SIZES = {"9k": 9_000, "1M": 1_000_000}
KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
ROUND_KEY = RoundKey("mlkem768-x25519", b"\x02" * round_key_bytes("mlkem768-x25519"))


@dataclass(frozen=True)
class Arm:
    """One way for numbers to travel.

    Args:
        up: encoding of updates.
        fraction: share of the values that ``top_k`` sends.
        feedback: whether devices keep what ``top_k`` leaves out.
        down: encoding of deltas; None sends the model whole.
    """

    up: EncodingName = "float32"
    fraction: float = 1.0
    feedback: bool = True
    down: DeltaEncoding | None = None

    @property
    def name(self) -> str:
        """For the table."""
        if self.down is not None:
            return f"{self.up} up, {self.down} delta down"
        if self.up != "top_k":
            return f"{self.up} up"
        return f"top_k {self.fraction:.0%} up{'' if self.feedback else ', no error feedback'}"


ARMS = (
    Arm(),
    Arm("float16"),
    Arm("int8"),
    Arm("top_k", 0.1),
    Arm("top_k", 0.1, feedback=False),
    Arm("top_k", 0.02),
    Arm("top_k", 0.02, feedback=False),
    Arm(down="float16"),
    Arm(down="int8"),
)


@dataclass(frozen=True)
class Study:
    """A model, its plan, and whom to leave out."""

    name: str
    model: str
    folds: int
    rounds: int
    plan: TrainingPlanMsg


@dataclass(frozen=True)
class Outcome:
    """What one training gave."""

    correct: int
    count: int
    bytes_up: int
    bytes_down: int


@dataclass
class MemoryStore:
    """Where error feedback is kept here."""

    blobs: dict[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> bytes | None:
        return self.blobs.get(name)

    def write(self, name: str, data: bytes) -> None:
        self.blobs[name] = data

    def delete(self, name: str) -> None:
        self.blobs.pop(name, None)

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.blobs if name.startswith(prefix)]


def main() -> None:
    """Measure, and print."""
    command = parser("update_encodings", __doc__)
    command.add_argument("--folds", type=int, default=3, choices=range(1, 6), help="pairs of people left out in turn")
    command.add_argument(
        "--rounds", type=int, default=60, help="rounds of every training; of the larger model 2.5 times as many"
    )
    arguments = command.parse_args()
    if arguments.rounds < 1:
        command.error("--rounds: at least 1")
    report = measure(folds=arguments.folds, rounds=arguments.rounds, progress=_progress)
    print(json.dumps(report, indent=1) if arguments.json else as_text(report))


def measure(*, folds: int, rounds: int, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """All figures."""
    todo = [(study, arm, fold) for study in studies(folds, rounds) for arm in ARMS for fold in FOLDS[: study.folds]]
    found: dict[tuple[str, str], list[Outcome]] = {}
    for done, (study, arm, fold) in enumerate(todo):
        progress(done, len(todo), f"{study.name}, {arm.name}")
        found.setdefault((study.name, arm.name), []).append(train(study, arm, fold))
    progress(len(todo), len(todo), "times")
    return {
        "accuracy_and_bytes": {
            study.name: {arm.name: _summary(found[study.name, arm.name]) for arm in ARMS}
            for study in studies(folds, rounds)
        },
        "milliseconds": times(),
        "rounds": rounds,
        "epsilon": EPSILON,
        "delta": DELTA,
        "cpu": cpu_name(),
    }


def studies(folds: int, rounds: int) -> Iterator[Study]:
    """The demo's model with its settings, with and without noise, and the larger one without."""
    noise = noise_multiplier_for(epsilon=EPSILON, delta=DELTA, sampling_rate=1.0, steps=rounds)
    yield Study("watch_features, epsilon 3", "watch_features", folds, rounds, plan(noise))
    yield Study("watch_features, no noise", "watch_features", folds, rounds, plan(0.0))
    # One fold: it takes as long as all of the smaller model's. After as few rounds as those it is not half trained, and
    # any change of the last bit moves it by points. Its learning rate is the better of 1.5 and 5.
    yield Study("watch_cnn, no noise", "watch_cnn", 1, rounds * 5 // 2, plan(0.0, learning_rate=5.0))


def plan(noise_multiplier: float, *, learning_rate: float = 1.5) -> TrainingPlanMsg:
    """The demo's plan."""
    return TrainingPlanMsg(
        sampling_rate=1.0,
        local_steps=1,
        learning_rate=learning_rate,
        l2_norm_clip=0.5,
        noise_multiplier=noise_multiplier,
        expected_batch_size=100.0,
    )


class Loaded:
    """A bundle, its graph, and every wrist's windows."""

    _cache: dict[str, Loaded] = {}  # noqa: RUF012 - one a process

    def __init__(self, model: str) -> None:
        path, publisher = bundle_and_publisher(model)
        self.bundle: ModelBundle = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))
        self.graph = TfliteGraph.of_bundle(self.bundle)
        recordings, samples = load_recordings(default_cache()), self.bundle.manifest.input.shape[0]
        self.records: dict[Wrist, Records] = {
            wrist: windows_of(recordings, wrist, samples=samples) for wrist in all_wrists()
        }

    @classmethod
    def of(cls, model: str) -> Loaded:
        """Loaded once."""
        if model not in cls._cache:
            cls._cache[model] = cls(model)
        return cls._cache[model]


def train(study: Study, arm: Arm, held_out: tuple[int, ...]) -> Outcome:
    """Train on everybody else, and measure the finished model on the people held out."""
    loaded, optimiser = Loaded.of(study.model), ServerOptimiser("fedavgm", learning_rate=1.0, momentum=0.9)
    published = loaded.bundle.params
    state, carried, versions = initial_state(optimiser, len(published)), np.zeros_like(published), []
    wrists = [wrist for wrist in all_wrists() if wrist.person not in held_out]
    devices = [_Device(wrist, arm, study, loaded) for wrist in wrists]
    bytes_down = published.nbytes
    for number in range(1, study.rounds + 1):
        total = np.zeros(len(published))
        for device in devices:
            total += device.update(published, number, fold=held_out)
        wanted, state = step(published + carried, state, total / len(devices), optimiser)
        if arm.down is None:
            published = wanted
        else:
            delta, published = make_delta(published, wanted, arm.down)
            carried, bytes_down = wanted - published, len(delta)
        versions.append(published)
    finished = np.mean(versions[len(versions) // 2 :], axis=0, dtype=np.float64).astype(np.float32)
    results = [
        evaluate(loaded.graph, finished, records)
        for wrist, records in loaded.records.items()
        if wrist.person in held_out
    ]
    correct, count = sum(result.correct for result in results), sum(result.count for result in results)
    return Outcome(correct, count, round(statistics.mean(device.bytes_up for device in devices)), bytes_down)


class _Device:
    """One wrist: trains, adds what was left out, encodes, and seals its last update."""

    def __init__(self, wrist: Wrist, arm: Arm, study: Study, loaded: Loaded) -> None:
        self._name, self._arm, self._study = wrist.device_id, arm, study
        self._records, self._graph, length = loaded.records[wrist], loaded.graph, len(loaded.bundle.params)
        self._feedback = ErrorFeedback(MemoryStore(), name="residual", length=length, released=lambda _digest: True)
        self.bytes_up = 0

    def update(self, params: Float32, number: int, *, fold: tuple[int, ...]) -> Float32:
        """What the aggregator decodes, float32 [d]."""
        arm, seed = self._arm, rotation_seed(bytes(32), number)
        draws = _seeded(f"{fold} {number} {self._name}")
        change = train_locally(self._graph, params, self._records, plan=self._study.plan, entropy=draws)
        leaves_out = arm.up == "top_k" and arm.feedback
        wanted = self._feedback.compensate(change, device=self._name) if leaves_out else change
        raw = encode_values(wanted, arm.up, seed=seed, entropy=draws, fraction=arm.fraction)
        body = UpdateBodyMsg(num_parameters=len(change), values=raw, encoding=arm.up)
        sent = open_values(body, seed=seed)
        if leaves_out:
            self._feedback.propose(wanted - sent, device=self._name, sealed_digest=b"")
        if number == self._study.rounds:
            self.bytes_up = len(sealed(body, self._study.plan, self._name))
        return sent


def sealed(body: UpdateBodyMsg, plan: TrainingPlanMsg, device: str) -> bytes:
    """The update as it would travel."""
    manifest = RoundManifestMsg(
        tenant="clinic",
        task="watch",
        round=1,
        status="open",
        engine="open",
        model_digest=bytes(32),
        graph_digest=bytes(32),
        num_parameters=body.num_parameters,
        recipient=ROUND_KEY.recipient(),
        plan=plan,
        opened_s=0.0,
        deadline_s=1.0,
        goal=1,
        minimum_cohort=1,
        participation_probability=1.0,
        minimum_separation_s=0.0,
    )
    return seal_update(body, manifest=manifest, device=device, update_id=bytes(16), signing_key=KEY)


def times() -> dict[str, dict[str, float]]:
    """Milliseconds to encode and to decode a vector, by its length, encoding and direction."""
    return {
        label: {
            name: round(statistics.median(blocks), 3)
            for name, blocks in alternate(dict(_timed_steps(length)), Lengths(7, 200_000 // length + 3)).items()
        }
        for label, length in SIZES.items()
    }


def _timed_steps(length: int) -> Iterator[tuple[str, Callable[[int], list[float]]]]:
    """What is timed, by name."""
    values = np.random.default_rng(1).normal(size=length).astype(np.float32)
    settings: tuple[tuple[EncodingName, float], ...] = (
        ("float32", 1.0),
        ("float16", 1.0),
        ("int8", 1.0),
        ("top_k", 0.1),
    )
    for name, fraction in settings:
        raw = encode_values(values, name, seed=b"", entropy=_seeded("times"), fraction=fraction)

        def encode(name: EncodingName = name, fraction: float = fraction) -> bytes:
            return encode_values(values, name, seed=b"", entropy=_seeded("times"), fraction=fraction)

        def decode(name: EncodingName = name, raw: bytes = raw) -> Float32:
            return decode_values(raw, name, num_parameters=length, seed=b"")

        yield f"{name} encode", timed(encode)
        yield f"{name} decode", timed(decode)


def _seeded(name: str) -> Entropy:
    """The same draws under the same name."""
    return Random(name).randbytes  # noqa: S311 - no privacy rests on a benchmark


def _summary(outcomes: list[Outcome]) -> dict[str, float]:
    """Of all folds."""
    return {
        "accuracy": round(statistics.mean(one.correct / one.count for one in outcomes), 4),
        "bytes_up": round(statistics.mean(one.bytes_up for one in outcomes)),
        "bytes_down": outcomes[0].bytes_down,
    }


def as_text(report: dict[str, Any]) -> str:
    """Tables in Markdown, as docs/compression.md has them."""
    lines = []
    for study, arms in report["accuracy_and_bytes"].items():
        baseline = arms[ARMS[0].name]["accuracy"]
        lines += [
            f"{study}:",
            "",
            "| | bytes up | bytes down | accuracy % | against float32 |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {one['bytes_up']:,} | {one['bytes_down']:,} | {100 * one['accuracy']:.1f} "
            f"| {100 * (one['accuracy'] - baseline):+.1f} |"
            for name, one in arms.items()
        ]
        lines.append("")
    sizes = report["milliseconds"]
    lines += [f"| milliseconds | {' | '.join(sizes)} |", "|---|" + "---|" * len(sizes)]
    lines += [
        f"| {name} | {' | '.join(f'{sizes[size][name]:.2f}' for size in sizes)} |"
        for name in next(iter(sizes.values()))
    ]
    return "\n".join([*lines, "", f"on {report['cpu']}"])


def _progress(done: int, total: int, what: str) -> None:
    """On a terminal, one line that is overwritten; into a file, nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{done}/{total} trainings: {what}{chr(10) if done == total else ''}")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
