"""Central training: the devices' steps, charges that survive any kill, and broken copies that the checks must catch."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundle_files import BUNDLES, committed
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from typer import Typer
from typer.testing import CliRunner

from device_client.adapters.tflite_graph import TfliteGraph
from device_client.errors import TrainingError
from device_client.noise import NoisyGrid
from device_client.training import Records, clipped_gradient_sum, poisson_sample, train_locally
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.messages import TrainingPlanMsg
from models.central import checkpoints
from models.central.checkpoints import CheckpointError, CheckpointFolder, run_digest
from models.central.data import read_records
from models.central.plan import Averaging, CentralPlan, plan_training
from models.central.training import (
    MemoryRun,
    Run,
    SeededSource,
    State,
    StepDone,
    SystemSource,
    Trained,
    train_centrally,
)
from models.cli_train import train
from models.publisher import create_key, load_public_key, write_public_key
from tests.device_client import noise_checks
from tests.device_client.noise_checks import FALSE_ALARM_RATE
from tests.device_client.ports import LogisticGraph, PowerCutError, make_records

Train = Callable[..., Trained]
CLIP, Z = 0.8, 3.0


def small_plan(**changes: Any) -> CentralPlan:
    settings: dict[str, Any] = {
        "num_examples": 20,
        "batch_size": 10,
        "steps": 12,
        "learning_rate": 0.5,
        "l2_norm_clip": CLIP,
        "noise_multiplier": Z,
    }
    return plan_training(**{**settings, **changes})


def noiseless_plan(**changes: Any) -> CentralPlan:
    plan = small_plan(noise_multiplier=None, **changes)
    return msgspec.structs.replace(plan, l2_norm_clip=CLIP)


def broken_copy(
    *,
    noise_factor: float = 1.0,
    noise_for_clip: float | None = None,
    clip_the_mean: bool = False,
    charge_after: bool = False,
    forget_charges: bool = False,
) -> Train:
    """`train_centrally` written again, with one thing done wrong."""

    def copy(graphs: Any, start: Any, records: Records, plan: CentralPlan, **rest: Any) -> Trained:
        run: Run = rest.get("run") or MemoryRun()
        every, on_step = rest.get("checkpoint_every", 100), rest.get("on_step")
        state = run.load() or State.fresh(start)
        forgotten = run.charged if forget_charges else 0
        while state.step < plan.steps:
            block = plan.affordable(min(every, plan.steps - state.step), charged=run.charged - forgotten)
            if block == 0:
                break
            if not charge_after:
                run.reserve(block)
            for _ in range(block):
                entropy = rest["source"].stream(state.step, 0)
                batch = np.flatnonzero(poisson_sample(len(records), plan.sampling_rate, entropy))
                clip = 1e10 if clip_the_mean else plan.l2_norm_clip
                total = clipped_gradient_sum(
                    graphs[0], state.params.astype(np.float32), records, batch, clip=clip, entropy=entropy
                )
                if clip_the_mean:
                    mean = total / max(1, len(batch))
                    total = len(batch) * mean * min(1, plan.l2_norm_clip / max(1e-12, float(np.linalg.norm(mean))))
                grid = NoisyGrid(noise_for_clip or plan.l2_norm_clip, noise_factor * plan.noise_multiplier, len(total))
                noisy = grid.release(total, entropy)
                params = state.params - plan.learning_rate / plan.expected_batch_size * noisy
                state = State(state.step + 1, params, state.velocity, state.weighted_sum)
                if on_step:
                    on_step(StepDone(state.step, run.charged, 0.0, None))
            if charge_after:
                run.reserve(block)
            run.save(state)
        charged = run.charged - forgotten
        return Trained(state.model(), state.step, charged, plan.epsilon(charged), (), 0.0, state.step)

    return copy


# What any such loop must do.


def check_the_noise_is_as_accounted(loop: Train) -> None:
    # False-alarm rate: 4 * FALSE_ALARM_RATE. The margin (2^-9) scales the noise up; it is below what 3000 draws show.
    records = Records(np.zeros((20, 1500, 2), np.float32), np.zeros(20, np.int32))
    for clip in (CLIP, 5 * CLIP):
        plan = small_plan(steps=1, l2_norm_clip=clip)
        graph = LogisticGraph(batch_size=8, num_inputs=3000)
        start = np.zeros(graph.num_parameters, np.float32)
        trained = loop([graph], start, records, plan, source=SeededSource(3))
        residual = trained.params.astype(np.float64) * plan.expected_batch_size / plan.learning_rate / (Z * clip)
        assert noise_checks.p_value_of_standard_deviation(residual, 1.0) > FALSE_ALARM_RATE
        assert noise_checks.p_value_of_normal(residual, 1.0) > FALSE_ALARM_RATE


def check_each_record_is_clipped_before_the_sum(loop: Train) -> None:
    plan = noiseless_plan(steps=1, batch_size=20)
    records, start = make_records(scale=3.0), np.zeros(12, np.float32)
    one = LogisticGraph(batch_size=1, num_inputs=6)
    total = sum(
        np.minimum(1, CLIP / np.linalg.norm(gradient)) * gradient
        for x, y in zip(records.x, records.y, strict=True)
        for gradient in [one.train(start, x[None], y[None], np.ones(1, np.float32), clip=np.inf)]
    )
    trained = loop([LogisticGraph(8, 6)], start, records, plan, source=SeededSource(3))
    np.testing.assert_allclose(trained.params, -0.5 / 20 * total, rtol=1e-5, atol=1e-7)


@dataclass
class WatchedRun(MemoryRun):
    """A folder in memory that outlives a killed process, and knows how many noisy sums there were."""

    computed: int = 0
    killed_at: set[int] = field(default_factory=set)

    def on_step(self, done: StepDone) -> None:
        """After each step, whose noisy sum has then been released; the process ends at some of them."""
        self.computed += 1
        assert self.charged >= self.computed, f"{self.computed} noisy sums, {self.charged} charged"
        if self.computed in self.killed_at:
            raise PowerCutError


def check_charges_cover_every_noisy_sum(loop: Train) -> None:
    plan = small_plan(epsilon=2.0, noise_multiplier=None, delta=1e-3)
    run = WatchedRun(killed_at={3, 9, 10})
    trained = None
    for _ in range(4):
        try:
            graph, start = LogisticGraph(8, 6), np.zeros(12, np.float32)
            trained = loop(
                [graph],
                start,
                make_records(),
                plan,
                source=SeededSource(3),
                run=run,
                checkpoint_every=5,
                on_step=run.on_step,
            )
        except PowerCutError:
            continue
    assert trained is not None
    assert trained.charged >= run.computed, f"{run.computed} noisy sums, {trained.charged} accounted"
    assert trained.epsilon >= plan.epsilon(run.computed)
    assert plan.epsilon(run.computed) <= 2.0
    assert trained.epsilon <= 2.0


CHECKS = [
    check_the_noise_is_as_accounted,
    check_each_record_is_clipped_before_the_sum,
    check_charges_cover_every_noisy_sum,
]


@pytest.mark.parametrize("check", CHECKS)
def test_central_training_passes(check: Callable[[Train], None]) -> None:
    check(train_centrally)


@pytest.mark.parametrize("check", CHECKS)
def test_the_copy_passes_while_nothing_is_broken(check: Callable[[Train], None]) -> None:
    check(broken_copy())


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.0), id="no noise"),
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_factor=0.9), id="a tenth less noise"),
        pytest.param(check_the_noise_is_as_accounted, broken_copy(noise_for_clip=CLIP), id="noise not by the clip"),
        pytest.param(check_each_record_is_clipped_before_the_sum, broken_copy(clip_the_mean=True), id="mean clipped"),
        pytest.param(check_charges_cover_every_noisy_sum, broken_copy(charge_after=True), id="charged afterwards"),
        pytest.param(check_charges_cover_every_noisy_sum, broken_copy(forget_charges=True), id="resume forgets"),
    ],
)
def test_broken_training_is_caught(check: Callable[[Train], None], broken: Train) -> None:
    with pytest.raises(AssertionError):
        check(broken)


# The devices' steps.


def synthetic(count: int = 70, seed: int = 0) -> Records:
    """Windows that a watch could record, of seven classes with different means."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 7, count).astype(np.int32)
    x = generator.normal(size=(count, 128, 6)) * 0.3 + 5 * np.eye(7, 6)[y][:, None, :]
    return Records(x.astype(np.float32), y)


def test_a_step_is_the_devices_step_with_the_same_entropy() -> None:
    bundle, records = committed("watch_features"), synthetic()
    graph = TfliteGraph.of_bundle(bundle)
    plan = small_plan(num_examples=len(records), batch_size=35, steps=1, l2_norm_clip=0.5)
    message = TrainingPlanMsg(
        sampling_rate=plan.sampling_rate,
        local_steps=1,
        learning_rate=plan.learning_rate,
        l2_norm_clip=plan.l2_norm_clip,
        noise_multiplier=plan.noise_multiplier,
        expected_batch_size=plan.expected_batch_size,
    )
    change = train_locally(graph, bundle.params, records, plan=message, entropy=SeededSource(7).stream(0, 0))
    trained = train_centrally([graph], bundle.params, records, plan, source=SeededSource(7))
    np.testing.assert_array_equal(trained.params, bundle.params + change)
    assert np.abs(change).max() > 0


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_graphs() -> None:
    bundle, records = committed("watch_features"), synthetic(200)
    plan = small_plan(num_examples=200, batch_size=150, momentum=0.9, averaging=Averaging("ema", 0.8))
    graphs = [TfliteGraph.of_bundle(bundle) for _ in range(3)]
    runs = [train_centrally(some, bundle.params, records, plan, source=SeededSource(7)) for some in (graphs, graphs)]
    assert runs[0].params.tobytes() == runs[1].params.tobytes()
    one = train_centrally(graphs[:1], bundle.params, records, plan, source=SeededSource(7))
    np.testing.assert_allclose(one.params, runs[0].params, atol=1e-5)
    other = train_centrally(graphs, bundle.params, records, plan, source=SeededSource(8))
    assert other.params.tobytes() != runs[0].params.tobytes()
    fresh = [train_centrally(graphs, bundle.params, records, plan, source=SystemSource()).params for _ in range(2)]
    assert fresh[0].tobytes() != fresh[1].tobytes()


def test_momentum_schedules_and_averages_are_what_they_say() -> None:
    records, start = make_records(), np.zeros(12, np.float32)

    def params_after(steps: int, **settings: Any) -> np.ndarray:
        plan = msgspec.structs.replace(noiseless_plan(batch_size=20, **settings), steps=steps)
        return train_centrally([LogisticGraph(8, 6)], start, records, plan, source=SeededSource(1)).params

    def gradient(at: np.ndarray) -> np.ndarray:
        return clipped_gradient_sum(
            LogisticGraph(8, 6), at.astype(np.float32), records, np.arange(20), clip=CLIP, entropy=os.urandom
        )

    first = -0.5 / 20 * gradient(start)
    second = 0.9 * first - 0.5 / 20 * gradient(first)
    np.testing.assert_allclose(params_after(2, momentum=0.9), first + second, atol=1e-6)
    halved = first - 0.25 / 20 * gradient(first)
    np.testing.assert_allclose(params_after(2, schedule="linear"), halved, atol=1e-6)
    np.testing.assert_allclose(params_after(2, schedule="cosine"), halved, atol=1e-6)
    one, two, three, four = (params_after(steps).astype(np.float64) for steps in (1, 2, 3, 4))
    np.testing.assert_allclose(params_after(4, averaging=Averaging("tail", 0.5)), (three + four) / 2, atol=1e-6)
    decayed = (0.25 * one + 0.5 * two + 1.0 * three) / 1.75
    np.testing.assert_allclose(params_after(3, averaging=Averaging("ema", 0.5)), decayed, atol=1e-6)


def test_epochs_are_measured_with_the_model_that_would_be_finished() -> None:
    plan = small_plan(steps=5, averaging=Averaging("tail", 1.0))
    seen: list[np.ndarray] = []
    trained = train_centrally(
        [LogisticGraph(8, 6)],
        np.zeros(12, np.float32),
        make_records(),
        plan,
        source=SeededSource(1),
        measure=lambda params: seen.append(params) or {"loss": float(len(seen))},  # type: ignore[func-returns-value]
    )
    assert [(each.step, each.measured["loss"]) for each in trained.history] == [(2, 1.0), (4, 2.0), (5, 3.0)]
    assert trained.history[0].epsilon == pytest.approx(plan.epsilon(2))
    np.testing.assert_array_equal(seen[-1], trained.params)


def test_divergence_is_an_error() -> None:
    plan = small_plan(learning_rate=1e300)
    with pytest.raises(TrainingError, match="lower learning rate"), np.errstate(all="ignore"):
        train_centrally([LogisticGraph(8, 6)], np.zeros(12, np.float32), make_records(), plan, source=SeededSource(1))


# Epsilon.


@pytest.mark.parametrize(
    ("epsilon", "delta", "count", "batch", "steps"),
    [(1.0, 1e-5, 60_000, 2048, 1000), (3.0, 1e-5, 1441, 256, 60), (8.0, 1e-6, 10_000, 10_000, 40)],
)
def test_the_noise_found_for_an_epsilon_costs_that_by_dp_accounting(
    epsilon: float, delta: float, count: int, batch: int, steps: int
) -> None:
    plan = small_plan(
        num_examples=count, batch_size=batch, steps=steps, epsilon=epsilon, noise_multiplier=None, delta=delta
    )

    def by(accountant: Any, noise: float) -> float:
        step = PoissonSampledDpEvent(plan.sampling_rate, GaussianDpEvent(noise))
        return float(accountant.compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta))

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    assert by(RdpAccountant(neighboring_relation=relation), plan.noise_multiplier) == pytest.approx(epsilon, rel=5e-3)
    # The tightest accountant never finds more than we say.
    tight = PLDAccountant(neighboring_relation=relation, value_discretization_interval=1e-3)
    assert by(tight, plan.noise_multiplier) <= epsilon
    assert plan.epsilon(steps) <= epsilon
    assert msgspec.structs.replace(plan, noise_multiplier=plan.noise_multiplier - 1e-4).epsilon(steps) > epsilon


def test_a_budget_affords_what_it_was_planned_for_and_not_much_more() -> None:
    plan = small_plan(num_examples=1441, batch_size=256, steps=60, epsilon=3.0, noise_multiplier=None)
    assert plan.affordable(60, charged=0) == 60
    more = plan.affordable(1000, charged=10)
    assert plan.epsilon(10 + more) <= 3.0 < plan.epsilon(11 + more)
    assert plan.affordable(5, charged=10 + more) == 0
    assert small_plan().affordable(10**9, charged=0) == 10**9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 21}, "expected 1 to 20, the number of examples"),
        ({"epsilon": 1.0}, "got both"),
        ({"epochs": 3}, "either steps or epochs"),
        ({"learning_rate": 0.0}, "learning rate: expected more than 0"),
        ({"l2_norm_clip": -1.0}, "l2 norm clip"),
        ({"noise_multiplier": 0.0}, "noise multiplier: expected more than 0"),
        ({"noise_multiplier": None, "epsilon": float("nan")}, "epsilon: expected more than 0"),
        ({"momentum": 1.0}, "momentum < 1"),
        ({"delta": 0.0}, "0 < delta"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalMisuseError, match=words):
        small_plan(**changes)


# Kills.

KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
sys.path.append(sys.argv[2])
from test_central_training import KILL_PLAN, open_run
from models.central.training import SeededSource, train_centrally
from tests.device_client.ports import LogisticGraph, make_records

def on_step(done):
    if done.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

with open_run(Path(sys.argv[1])) as run:
    train_centrally([LogisticGraph(8, 6)], np.zeros(12, np.float32), make_records(), KILL_PLAN,
                    source=SeededSource(1), run=run, checkpoint_every=4, on_step=on_step)
"""
KILL_PLAN = plan_training(
    num_examples=20, batch_size=10, steps=12, learning_rate=0.5, l2_norm_clip=CLIP, epsilon=4.0, delta=1e-3
)


def open_run(folder: Path, plan: CentralPlan = KILL_PLAN, *, seed: int = 1) -> CheckpointFolder:
    start = np.zeros(12, np.float32)
    digest = run_digest(plan, graph_digest=b"g", start=start, records=make_records(), seed=seed)
    return CheckpointFolder(folder, plan, digest)


def finish(run: Run, plan: CentralPlan = KILL_PLAN, **settings: Any) -> Trained:
    return train_centrally(
        [LogisticGraph(8, 6)],
        np.zeros(12, np.float32),
        make_records(),
        plan,
        source=SeededSource(1),
        run=run,
        checkpoint_every=4,
        **settings,
    )


def test_a_process_killed_by_the_system_goes_on_and_its_steps_stay_charged(tmp_path: Path) -> None:
    folder, here = tmp_path / "run", Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, here, "6"], cwd=here.parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    with open_run(folder) as run:
        state = run.load()
        assert (state.step if state else 0, run.charged) == (4, 8)
        trained = finish(run)
    # Steps 5 to 8 were charged twice, so the budget, which is planned for 12, ends the training early.
    assert trained.charged == KILL_PLAN.affordable(100, charged=0)
    assert trained.steps == trained.charged - 4
    assert trained.epsilon <= 4.0
    assert np.isfinite(trained.params).all()
    untouched = finish(MemoryRun(), msgspec.structs.replace(KILL_PLAN, steps=trained.steps))
    assert trained.params.tobytes() == untouched.params.tobytes()
    with open_run(folder) as run:
        assert finish(run).charged == trained.charged, "a finished run spends nothing more"


@pytest.mark.parametrize("name", [checkpoints.CHARGES, checkpoints.STATE])
def test_a_full_disk_is_one_sentence_and_nothing_is_uncharged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, computed = checkpoints.write_atomic, []

    def full(path: Path, data: bytes) -> None:
        if path.name == name and computed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomic", full)
    with open_run(tmp_path) as run, pytest.raises(CheckpointError, match=r"No space left on device.*goes on from"):
        finish(run, on_step=computed.append)
    monkeypatch.undo()
    with open_run(tmp_path) as run:
        assert run.charged >= len(computed) > 0
        assert finish(run).epsilon <= 4.0


def test_a_folder_holds_one_run_of_one_process(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        finish(run)
        with pytest.raises(CheckpointError, match="in use by another process"):
            open_run(tmp_path)
    for other in (msgspec.structs.replace(KILL_PLAN, learning_rate=0.6), KILL_PLAN):
        with pytest.raises(CheckpointError, match="of another run"):
            open_run(tmp_path, other, seed=2 if other == KILL_PLAN else 1)
    assert json.loads((tmp_path / checkpoints.CHARGES).read_text())["charged"] == 12


def test_damaged_or_lost_files_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        finish(run)
    charges, state = tmp_path / checkpoints.CHARGES, tmp_path / checkpoints.STATE
    kept = charges.read_bytes()
    charges.unlink()
    with pytest.raises(CheckpointError, match="which counts what was spent"):
        open_run(tmp_path)
    charges.write_bytes(kept[:-9])
    with pytest.raises(CheckpointError, match="is damaged"):
        open_run(tmp_path)
    charges.write_bytes(kept)
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"delete the file state.*keeps what was spent"):
        open_run(tmp_path)


# Data.


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_eight_bit_examples_become_float32_as_they_are(tmp_path: Path) -> None:
    x = np.arange(2 * 128 * 6, dtype=np.uint8).reshape(2, 128, 6)
    records = read_records(
        npz(tmp_path / "d.npz", x=x, y=np.array([0, 6], np.uint8)),
        committed("watch_features").manifest,
        option="--data",
    )
    assert (records.x.dtype, records.y.dtype) == (np.dtype(np.float32), np.dtype(np.int32))
    np.testing.assert_array_equal(records.x, x)


X, Y = np.zeros((3, 128, 6), np.float32), np.zeros(3, np.int32)
SPOILT = X.copy()
SPOILT[1, 5, 5] = np.nan
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"x": X[:, :100], "y": Y}, r"takes x of shape \[n, 128, 6\], got \[3, 100, 6\]"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"got \[0, 128, 6\]"),
    "NaN": ({"x": SPOILT, "y": Y}, r"x\[1\] holds NaN or infinity, 1 examples"),
    "overflow": ({"x": X.astype(np.float64) + 1e300, "y": Y}, r"x\[0\] holds NaN or infinity"),
    "text": ({"x": X.astype(str), "y": Y}, "x holds <U"),
    "no x": ({"z": X}, "there is no array x"),
    "no y": ({"x": X}, "there is no array y"),
    "count": ({"x": X, "y": Y[:2]}, "3 examples in x and y has shape"),
    "range": ({"x": X, "y": Y + 7}, "the labels run from 7 to 7, the model knows 0 to 6"),
    "halves": ({"x": X, "y": Y + 0.5}, "not whole"),
    "NaN label": ({"x": X, "y": np.array([0, 1, np.nan])}, "not whole"),
    "two a row": ({"x": X, "y": np.zeros((3, 2), np.int32)}, "one class index an example"),
    "objects": ({"x": X, "y": np.array([None, 1, "a"])}, "expected an .npz file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_unusable_data_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    arrays, words = UNUSABLE[case]
    with pytest.raises(LocalMisuseError, match=words) as caught:
        read_records(npz(tmp_path / "d.npz", **arrays), committed("watch_features").manifest, option="--data")
    assert str(caught.value).startswith(f"--data {tmp_path / 'd.npz'}: ")


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    manifest = committed("watch_features").manifest
    whole = npz(tmp_path / "d.npz", x=X, y=Y).read_bytes()
    for name, data in (("cut.npz", whole[:-100]), ("text.npz", b"hello"), ("none.npz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LocalMisuseError, match=r"expected an \.npz file"):
            read_records(tmp_path / name, manifest, option="--data")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(LocalMisuseError, match=r"expected an \.npz file"):
        read_records(tmp_path / "one.npy", manifest, option="--data")
    with pytest.raises(LocalMisuseError, match="No such file"):
        read_records(tmp_path / "nowhere.npz", manifest, option="--data")


# The command.

app = Typer()
app.command()(train)


def run_train(*arguments: object) -> str:
    """Run it in this process; errors of ours come out as they are."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A publisher's key, and data."""
    write_public_key(create_key(tmp_path / "publisher.key"), tmp_path)
    for name, seed in (("train", 0), ("test", 1)):
        records = synthetic(seed=seed)
        npz(tmp_path / f"{name}.npz", x=records.x, y=records.y)
    return tmp_path


def options(folder: Path, *more: object, out: str = "out.covey") -> list[object]:
    given = ["--data", folder / "train.npz", "--out", folder / out, "--key", folder / "publisher.key"]
    return [BUNDLES / "watch_features.covey", *given, "--batch-size", 35, *more]


def test_a_trained_bundle_is_signed_says_what_it_cost_and_infers_with_its_parameters(folder: Path) -> None:
    shown = run_train(
        *options(folder, "--epsilon", 3, "--epochs", 3, "--validation", folder / "test.npz"),
        "--report",
        folder / "report.json",
    )
    assert "epoch 3/3, step 6/6, validation loss" in shown
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    start = committed("watch_features")
    assert bundle.manifest.version == start.manifest.version + 1
    assert bundle.manifest.description.startswith(start.manifest.description)
    assert "Trained centrally for 6 steps on train, record-level epsilon 2.9999 at delta 1e-05 (Poisson DP-SGD" in (
        bundle.manifest.description
    )
    assert bundle.graph == start.graph
    assert not np.array_equal(bundle.params, start.params)
    assert bundle.params.tobytes() in bundle.infer_template
    report = json.loads((folder / "report.json").read_text())
    assert report["privacy"]["noisy_sums_charged"] == report["steps"] == 6
    assert 2.99 < report["privacy"]["epsilon"] <= 3.0
    assert report["measured"].keys() == {"loss", "accuracy"}
    assert [each["step"] for each in report["history"]] == [2, 4, 6]


def test_without_privacy_it_is_said_everywhere(folder: Path) -> None:
    more = ("--steps", 40, "--learning-rate", 10, "--validation", folder / "test.npz", "--report", folder / "r.json")
    shown = run_train(*options(folder, "--no-dp", *more))
    assert "NO PRIVACY: --no-dp" in shown
    assert "no privacy" in shown.splitlines()[-4]
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    assert bundle.manifest.description.endswith("Trained centrally for 40 steps on train without privacy.")
    report = json.loads((folder / "r.json").read_text())
    assert report["privacy"]["epsilon"] is None
    assert report["measured"]["accuracy"] > 0.5
    shown = run_train(
        *options(folder, "--epsilon", 3, "--steps", 4, "--seed", 1, "--report", folder / "s.json", out="s")
    )
    assert "NO PRIVACY: noise from a --seed" in shown
    assert "epsilon" not in shown
    assert json.loads((folder / "s.json").read_text())["privacy"]["epsilon"] is None


def test_nothing_is_measured_on_private_data(folder: Path) -> None:
    shown = run_train(*options(folder, "--epsilon", 3, "--steps", 4, "--report", folder / "r.json"))
    assert "a loss on the private data is not covered by epsilon" in shown
    assert "validation" not in shown.replace("--validation", "")
    assert json.loads((folder / "r.json").read_text())["measured"] == {}


def test_the_command_resumes_and_says_what_was_charged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = options(folder, "--epsilon", 3, "--steps", 12, "--checkpoint", folder / "run", "--checkpoint-every", 4)
    saves: list[State] = []
    save = CheckpointFolder.save

    def cut(self: CheckpointFolder, state: State) -> None:
        saves.append(state)
        if len(saves) == 2:
            raise PowerCutError
        save(self, state)

    monkeypatch.setattr(CheckpointFolder, "save", cut)
    with pytest.raises(PowerCutError):
        run_train(*command)
    assert not (folder / "out.covey").exists()
    shown = run_train(*command)
    assert "Resumed at step 4; 8 noisy sums were charged before." in shown
    assert "Ended 4 steps early" in shown
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    assert "for 8 steps on train, record-level epsilon 3.0000" in bundle.manifest.description
    assert "12 noisy sums" in bundle.manifest.description


def test_what_cannot_be_done_is_refused_before_training(folder: Path) -> None:
    def refused(words: str, *more: object, error: type[Exception] = LocalMisuseError, **rest: str) -> None:
        with pytest.raises(error, match=words):
            run_train(*options(folder, *more, **rest))

    refused("one of --epsilon, --noise-multiplier and --no-dp")
    refused("one of --epsilon, --noise-multiplier and --no-dp", "--no-dp", "--epsilon", 1)
    refused("--epochs or --steps", "--no-dp", "--epochs", 1, "--steps", 1)
    refused("such as tail:0.5", "--no-dp", "--average", "tail:x")
    refused("such as tail:0.5", "--no-dp", "--average", "tail:2")
    refused("expected 1 to 70", "--no-dp", "--batch-size", 71)
    (folder / "there.covey").write_bytes(b"")
    refused(r"there\.covey exists: .* --force", "--no-dp", out="there.covey")
    stranger = folder / "stranger.pub"
    stranger.write_text("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a\n")
    refused("not signed by the pinned publisher", "--no-dp", "--verify", stranger, error=BundleError)
    with pytest.raises(LocalMisuseError, match="the key of another publisher"):
        run_train(
            BUNDLES / "watch_features.covey", "--data", folder / "train.npz", "--out", folder / "o.covey", "--no-dp"
        )


def test_plain_training_needs_no_tensorflow(folder: Path) -> None:
    program = (
        "import sys; from typer import Typer; from models.cli_train import train\n"
        "app = Typer(); app.command()(train); app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'tensorflow', 'tensorflow_privacy', 'keras', 'aggregator'} & set(sys.modules)\n"
    )
    command = [str(each) for each in options(folder, "--epsilon", 3, "--steps", 2)]
    subprocess.run([sys.executable, "-c", program, *command], check=True, cwd=Path(__file__).parents[2])
