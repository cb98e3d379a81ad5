"""The command ``covey-model train``. It needs a TFLite runtime; TensorFlow only for ``--reference``."""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from device_client.training import Records
from fl_protocol.adapters import key_files
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError
from models import output_files, publisher
from models.central import release
from models.central.checkpoints import CheckpointFolder, run_digest
from models.central.data import read_records
from models.central.measuring import measure_on
from models.central.plan import Averaging, CentralPlan, plan_training
from models.central.progress import TrainingDisplay, as_text
from models.central.training import (
    Measure,
    MemoryRun,
    Run,
    SeededSource,
    Source,
    SystemSource,
    Trained,
    train_centrally,
)
from models.quiet import quiet_tensorflow
from models.sources import load_python

if TYPE_CHECKING:
    from models.central.tf_privacy import ReferenceResult

_out = Console()
_TRAINING_SAMPLE = 2000
"""Without privacy and without --validation, so many training examples are measured."""
_AVERAGES = {"none": 0.0, "tail": 0.5, "ema": 0.99}
"""The kinds, and the number that each has if none is given."""


class Schedule(str, enum.Enum):
    """How the learning rate goes on."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Reference(str, enum.Enum):
    """With what to compare."""

    tensorflow_privacy = "tensorflow-privacy"
    tensorflow_privacy_model = "tensorflow-privacy-model"


def train(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The .covey file to start from.")],
    *,
    data: Annotated[Path, typer.Option(metavar="FILE.npz", help="Training examples: arrays x and y.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .covey file to write, one version up.")],
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Other examples, measured after every epoch.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="KEYFILE", help="Sign with this key. Without it a fresh key signs and is forgotten."),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="KEYFILE", help="BUNDLE's publisher's public key (default: publisher.pub beside it)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data (default: 10).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Expected size of a Poisson batch.")] = 256,
    learning_rate: Annotated[float | None, typer.Option(help="Of the first step (default: the bundle's).")] = None,
    learning_rate_schedule: Annotated[Schedule, typer.Option(help="cosine and linear end at 0.")] = Schedule.constant,
    l2_norm_clip: Annotated[
        float | None, typer.Option(help="Bound on an example's gradient (default: the bundle's).")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Budget: the least noise is found that keeps all steps within it.")
    ] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise over the clip, instead of --epsilon.")] = None,
    delta: Annotated[float, typer.Option(help="At which epsilon holds; below 1 / examples.")] = 1e-5,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="No clipping, no noise, no privacy.")] = False,
    momentum: Annotated[float, typer.Option(help="Heavy ball, on the noisy steps.")] = 0.0,
    average: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="none; tail:F, the mean over the last fraction F of steps; ema:D, with decay D."
        ),
    ] = "none",
    seed: Annotated[
        int | None, typer.Option(help="Repeatable batches and noise, for experiments: gives no privacy.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Copies of the graph that share a batch.")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep checkpoints here; the same command resumes.")
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", help="A kill loses at most so many steps; their epsilon stays spent.")
    ] = 100,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Settings, privacy and history.")] = None,
    reference: Annotated[
        Reference | None,
        typer.Option(
            help="Train the Keras model by TensorFlow Privacy too, with DPKerasSGDOptimizer or, faster, DPModel, and "
            "compare."
        ),
    ] = None,
    custom: Annotated[
        list[Path] | None,
        typer.Option(metavar="MODULE.py", help="With --reference: a file that registers layers of yours; it is run."),
    ] = None,
    data_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the bundle's description calls the data (default: FILE).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite --out, --report and publisher.pub beside --out.")
    ] = False,
) -> None:
    """Train a bundle on data in one place, with DP-SGD by the devices' own code.

    Examples:
    covey-model train my.covey --data train.npz --validation test.npz --epsilon 3 --out trained.covey --key
    publisher.key

    covey-model train my.covey --data public.npz --no-dp --epochs 20 --out pretrained.covey --key publisher.key

    covey-model train my.covey --data train.npz --epsilon 3 --steps 2000 --average tail:0.5 --checkpoint run1 --out
    t.covey
    """
    if sum((epsilon is not None, noise_multiplier is not None, no_dp)) != 1:
        raise LocalMisuseError("train: give one of --epsilon, --noise-multiplier and --no-dp.")
    if epochs is not None and steps is not None:
        raise LocalMisuseError("train: give --epochs or --steps, not both.")
    averaging = _averaging(average)
    signer = key_files.load_key(key) if key else Ed25519PrivateKey.generate()
    others = [path for path in (bundle, data, validation, key, verify) if path]
    output_files.check_targets([out, *([report] if report else [])], others=others, force=force)
    publisher.check_public_key(out.parent, signer, force=force)
    opened = publisher.opened(bundle, verify)
    records = read_records(data, opened.manifest, option="--data")
    held_out = read_records(validation, opened.manifest, option="--validation") if validation else None
    defaults = opened.manifest.defaults
    plan = plan_training(
        num_examples=len(records),
        batch_size=batch_size,
        steps=steps,
        epochs=None if steps is not None else epochs or 10,
        learning_rate=defaults.learning_rate if learning_rate is None else learning_rate,
        l2_norm_clip=defaults.l2_norm_clip if l2_norm_clip is None else l2_norm_clip,
        noise_multiplier=noise_multiplier,
        epsilon=epsilon,
        delta=delta,
        schedule=learning_rate_schedule.value,
        momentum=momentum,
        averaging=averaging,
    )
    training = _Training(opened, records, held_out, plan, seed=seed, threads=threads)
    _say(*training.warnings())
    trained = training.run(checkpoint, checkpoint_every)
    name = data_name or data.stem
    measured = training.measured(trained)
    said = release.provenance(plan, trained, data_name=name, seeded=seed is not None)
    output_files.write(out, release.sign_trained(opened, trained, sentence=said, publisher_key=signer))
    public = publisher.write_public_key(signer, out.parent)
    _say(*_summary(plan, trained, said, measured), f"{out}: version {opened.manifest.version + 1}, signed for {public}")
    summary = release.report(opened, plan, trained, data_name=name, seed=seed, measured=measured)
    if reference is not None:
        summary["reference"] = _compare(
            training,
            trained,
            reference,
            custom=custom or [],
            measured=measured,
            epsilon=summary["privacy"]["epsilon"],
        )
    if report is not None:
        output_files.write(report, json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n")


@dataclass(frozen=True)
class _Training:
    """What is trained, on what, how."""

    bundle: ModelBundle
    records: Records
    held_out: Records | None
    plan: CentralPlan
    seed: int | None
    threads: int

    @property
    def source(self) -> Source:
        """Of batches and noise."""
        return SystemSource() if self.seed is None else SeededSource(self.seed)

    @property
    def claims_privacy(self) -> bool:
        """Whether there is noise that nobody can repeat."""
        return self.plan.is_private and self.seed is None

    def warnings(self) -> list[str]:
        """What a person must know before it starts."""
        found = []
        if not self.plan.is_private:
            found.append("NO PRIVACY: --no-dp trains without clipping and noise; the model can give its data away.")
        elif self.seed is not None:
            found.append("NO PRIVACY: noise from a --seed can be repeated and taken off again.")
        elif self.plan.delta >= 1 / len(self.records):
            found.append(
                f"Warning: delta {self.plan.delta:g} is not below 1 / {len(self.records)} examples; a mechanism that "
                "publishes one of them would pass."
            )
        if self.claims_privacy and self.held_out is None:
            found.append(
                "No --validation: nothing is measured, since a loss on the private data is not covered by epsilon."
            )
        return found

    def measure(self) -> Measure | None:
        """On the validation data; on some of the training data only where there is no privacy to lose."""
        graph = TfliteGraph.of_bundle(self.bundle)
        if self.held_out is not None:
            return measure_on(self.bundle, graph, self.held_out)
        if self.claims_privacy:
            return None
        some = Records(self.records.x[:_TRAINING_SAMPLE], self.records.y[:_TRAINING_SAMPLE])
        return measure_on(self.bundle, graph, some)

    def run(self, folder: Path | None, every: int) -> Trained:
        """Train, from the checkpoint if there is one."""
        graphs = [TfliteGraph.of_bundle(self.bundle) for _ in range(self.threads)]
        with (
            self._kept(folder) as run,
            TrainingDisplay(_out, self.plan, seeded=self.seed is not None) as display,
        ):
            state = run.load()
            if run.charged:
                _say(f"Resumed at step {state.step if state else 0}; {run.charged} noisy sums were charged before.")
            return train_centrally(
                graphs,
                self.bundle.params,
                self.records,
                self.plan,
                source=self.source,
                run=run,
                checkpoint_every=every,
                measure=self.measure(),
                on_step=display.on_step,
            )

    def measured(self, trained: Trained) -> dict[str, float]:
        """The finished model on the validation data."""
        measure = self.measure() if self.held_out is not None else None
        return dict(measure(trained.params)) if measure else {}

    @contextlib.contextmanager
    def _kept(self, folder: Path | None) -> Iterator[Run]:
        """The run in its folder, or in memory."""
        if folder is None:
            yield MemoryRun()
            return
        digest = run_digest(
            self.plan,
            graph_digest=self.bundle.graph_digest,
            start=self.bundle.params,
            records=self.records,
            seed=self.seed,
        )
        with CheckpointFolder(folder, self.plan, digest) as run:
            yield run


def _averaging(text: str) -> Averaging:
    """From ``none``, ``tail:0.5`` or ``ema:0.99``."""
    kind, _, amount = text.partition(":")
    try:
        number = float(amount or _AVERAGES[kind])
        return Averaging(kind, number)  # type: ignore[arg-type]  # one of its names, or a KeyError before
    except (KeyError, ValueError):
        raise LocalMisuseError(
            f"--average {text}: expected none, tail:FRACTION or ema:DECAY with a number between 0 and 1, such as "
            "tail:0.5."
        ) from None


def _summary(plan: CentralPlan, trained: Trained, said: str, measured: dict[str, float]) -> list[str]:
    """What came out, for people."""
    lines = [said]
    if trained.steps < plan.steps:
        lines.append(
            f"Ended {plan.steps - trained.steps} steps early: steps that were lost and run again had spent the budget."
        )
        if plan.averaging.kind == "tail" and trained.steps <= (1 - plan.averaging.amount) * plan.steps:
            lines.append("The mean over the last steps had not begun, so these are the last parameters themselves.")
    if measured:
        lines.append(as_text(measured)[:1].upper() + as_text(measured)[1:] + ".")
    return lines


def _compare(
    training: _Training,
    trained: Trained,
    reference: Reference,
    *,
    custom: list[Path],
    measured: dict[str, float],
    epsilon: float | None,
) -> dict[str, Any]:
    """Train with TensorFlow Privacy, print both side by side, and return its numbers."""
    plan = training.plan
    with quiet_tensorflow():
        from models.central.tf_privacy import limit_threads, train_reference  # noqa: PLC0415 - slow

        limit_threads(training.threads)
        for path in custom:
            load_python(path)
        other: ReferenceResult = train_reference(
            training.bundle,
            training.records,
            plan,
            method="optimizer" if reference is Reference.tensorflow_privacy else "model",
            steps=trained.steps,
            source=training.source,
            seed=training.seed,
        )
    measure = training.measure() if training.held_out is not None else None
    theirs = dict(measure(other.params)) if measure else {}
    table = Table("", "Covey", "TensorFlow Privacy")
    for name, value in measured.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{theirs[name]:.4f}")
    private = epsilon is not None
    ours_shown = release.rounded_up(trained.epsilon) if private else "no privacy"
    theirs_shown = release.rounded_up(other.epsilon) if private else "no privacy"
    table.add_row(f"epsilon at delta {plan.delta:g}", ours_shown, theirs_shown)
    table.add_row("seconds", f"{trained.seconds:.2f}", f"{other.seconds:.2f} + {other.first_seconds:.2f} tracing")
    speeds = release.examples_per_second(plan, trained), other.examples_per_second(plan)
    table.add_row("examples/s", *(f"{speed:,.0f}" for speed in speeds))
    _out.print(table)
    _say(
        "Both draw Poisson batches and divide by the expected batch size; epsilon by Covey's accountant and by "
        "dp-accounting, for one record added or removed.",
        *other.remarks,
    )
    return {
        "name": reference.value,
        "sampling": "Poisson",
        "measured": theirs,
        "epsilon": other.epsilon if private else None,
        "seconds": other.seconds,
        "first_step_seconds": other.first_seconds,
        "examples_per_second": speeds[1],
        "remarks": list(other.remarks),
    }


def _say(*lines: str) -> None:
    for line in lines:
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
