"""Ports for tests: a store in memory that can lose power, and a logistic regression as the trainable graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from device_client.errors import StoreError
from device_client.ports import Float32, Labels
from device_client.training import Records
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.messages import RoundManifestMsg, TrainingPlanMsg
from fl_protocol.model_manifest import DropoutMask
from fl_protocol.plans import PlanMsg
from fl_protocol.sealing import RoundKey, round_key_bytes

TENANT, TASK, DEVICE = "clinic", "watch", "watch-0"
GRAPH_DIGEST = b"\x07" * 32
ROUND_KEY = RoundKey("x25519", b"\x05" * round_key_bytes("x25519"))


@dataclass
class MemoryStore:
    """`device_client.ports.Store` in memory.

    Args:
        operations: what was done, in order: the evidence for order-of-events tests.
        full: refuse every write, as a full disk does.
        cut_at: lose power at this operation (0-based), before or after it took effect.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    logs: dict[str, bytes] = field(default_factory=dict)
    operations: list[tuple[str, str]] = field(default_factory=list)
    full: bool = False
    cut_at: int | None = None
    cut_after: bool = False

    def _change(self, kind: str, name: str, effect: object) -> None:
        here = len(self.operations) == self.cut_at
        if here and not self.cut_after:
            raise PowerCutError
        if self.full:
            raise StoreError(f"{name} cannot be written (No space left on device)")
        self.operations.append((kind, name))
        assert callable(effect)
        effect()
        if here:
            raise PowerCutError

    def read(self, name: str) -> bytes | None:
        return self.blobs.get(name)

    def write(self, name: str, data: bytes) -> None:
        self._change("write", name, lambda: self.blobs.__setitem__(name, data))

    def delete(self, name: str) -> None:
        self._change("delete", name, lambda: self.blobs.pop(name, None))

    def names(self, prefix: str) -> Iterable[str]:
        return sorted(name for name in self.blobs if name.startswith(prefix))

    def read_log(self, name: str) -> bytes:
        return self.logs.get(name, b"")

    def append_log(self, name: str, line: bytes) -> None:
        self._change("append", name, lambda: self.logs.__setitem__(name, self.read_log(name) + line + b"\n"))

    def truncate_log(self, name: str, length: int) -> None:
        self.logs[name] = self.read_log(name)[:length]

    def after_restart(self) -> MemoryStore:
        """What the next process finds."""
        return MemoryStore(dict(self.blobs), dict(self.logs))


@dataclass
class LogisticGraph:
    """`device_client.ports.Graph`: softmax regression on flattened windows, per-example gradients clipped in L2."""

    batch_size: int
    num_inputs: int
    num_classes: int = 2
    dropout: tuple[DropoutMask, ...] = ()
    calls: int = 0
    rows: list[int] = field(default_factory=list)
    few: int = 0
    sizes: list[int] = field(default_factory=list)

    @property
    def train_sizes(self) -> tuple[int, ...]:
        return (self.few, self.batch_size) if self.few else (self.batch_size,)

    @property
    def num_parameters(self) -> int:
        return self.num_inputs * self.num_classes

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        self.calls += 1
        self.rows.append(int(mask.sum()))
        assert len(x) == len(y) == len(mask)
        assert len(mask) in self.train_sizes
        self.sizes.append(len(mask))
        gradients = self._per_example(params, x, y)
        norms = np.linalg.norm(gradients, axis=1)
        scale = mask * np.minimum(1.0, clip / np.maximum(norms, 1e-12))
        return (gradients * scale[:, None]).sum(axis=0).astype(np.float32)

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        chance = self._chances(params, x)
        loss = -np.log(chance[np.arange(len(y)), y] + 1e-12)
        return float((loss * mask).sum()), float(((chance.argmax(axis=1) == y) * mask).sum())

    def _chances(self, params: Float32, x: Float32) -> Float32:
        logits = x.reshape(len(x), -1).astype(np.float64) @ params.reshape(self.num_inputs, self.num_classes)
        exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: Float32 = exponent / exponent.sum(axis=1, keepdims=True)
        return result

    def _per_example(self, params: Float32, x: Float32, y: Labels) -> Float32:
        error = self._chances(params, x)
        error[np.arange(len(y)), y] -= 1
        inputs = x.reshape(len(x), -1)
        result: Float32 = (inputs[:, :, None] * error[:, None, :]).reshape(len(x), -1)
        return result


class UnclippedGraph(LogisticGraph):
    """A broken graph: it ignores `clip`."""

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        del clip
        return super().train(params, x, y, mask, clip=np.inf)


def make_records(*, count: int = 20, num_inputs: int = 6, scale: float = 1.0, seed: int = 0) -> Records:
    """Windows [count, num_inputs / 2, 2] of two classes with different means."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, count).astype(np.int32)
    x = generator.normal(size=(count, num_inputs)) + (2 * y - 1)[:, None]
    return Records((scale * x).reshape(count, num_inputs // 2, 2).astype(np.float32), y)


def make_plan(**changes: float) -> TrainingPlanMsg:
    settings = {
        "sampling_rate": 1.0,
        "local_steps": 1,
        "learning_rate": 0.5,
        "l2_norm_clip": 1.0,
        "noise_multiplier": 4.0,
        "expected_batch_size": 20.0,
    }
    return TrainingPlanMsg(**{**settings, **changes})  # type: ignore[arg-type]


def make_manifest(*, plan: PlanMsg | None = None, **changes: object) -> RoundManifestMsg:
    settings: dict[str, object] = {
        "tenant": TENANT,
        "task": TASK,
        "round": 1,
        "status": "open",
        "engine": "open",
        "model_digest": b"\x01" * 32,
        "graph_digest": GRAPH_DIGEST,
        "num_parameters": 12,
        "recipient": ROUND_KEY.recipient(),
        "plan": plan if plan is not None else make_plan(),
        "opened_s": 1000.0,
        "deadline_s": 2000.0,
        "goal": 3,
        "minimum_cohort": 2,
        "participation_probability": 1.0,
        "minimum_separation_s": 0.0,
    }
    settings.update(changes)
    if settings["status"] != "open":
        settings["recipient"] = None
    return RoundManifestMsg(**settings)  # type: ignore[arg-type]
