"""The command ``covey-model export``. TensorFlow is imported only once the arguments are known to be good."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fl_protocol.adapters.files import write_atomic
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import BundleManifest
from models import publisher
from models.export.data import Examples, read_examples, read_params
from models.quiet import quiet_tensorflow
from models.sources import load_python

if TYPE_CHECKING:
    from models.export.checked import Exported, ExportRequest

_out = Console()


class Format(str, enum.Enum):
    """What to make."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    tflm = "tflm"


def export(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .covey file.")],
    *,
    format: Annotated[
        Format,
        typer.Option(help="TFLite in float32, float16 weights or full int8; tflm: int8 as C source."),
    ],
    params: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Trained parameters, float32; else the bundle's own.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Recordings x in the manifest's units and labels y; needed for int8 and tflm."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The .tflite to write, or the .cc beside which the .h goes.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="End in softmax or sigmoid.")] = False,
    int8_io: Annotated[bool, typer.Option("--int8-io", help="int8: input and output are int8 too.")] = False,
    keep_float: Annotated[bool, typer.Option("--float", help="tflm: float32 instead of int8.")] = False,
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="Keep no file if accuracy drops by more points (or the error rises).")
    ] = None,
    custom: Annotated[
        list[Path] | None, typer.Option(metavar="MODULE.py", help="A file that registers layers of yours; it is run.")
    ] = None,
    publisher_key: Annotated[
        Path | None, typer.Option("--publisher", help="Public key file; else publisher.pub beside the bundle.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Make a file for phones or microcontrollers, and measure what the conversion costs."""
    _check_options(format, data, int8_io=int8_io, keep_float=keep_float, max_drop=max_drop)
    opened = publisher.opened(bundle, publisher_key)
    paths = _targets(opened.manifest, format, out, force=force)
    vector = read_params(params, opened) if params else None
    examples = read_examples(data, opened.manifest) if data else None
    with quiet_tensorflow():
        from models.export.checked import ExportRequest  # noqa: PLC0415 - slow: only once the arguments are known to be good
    request = ExportRequest(
        format=format.value,
        params=vector,
        examples=examples,
        probabilities=probabilities,
        int8_io=int8_io,
        keep_float=keep_float,
        max_drop=max_drop,
    )
    exported = _with_progress(opened, request, custom or [])
    _out.print(_table(opened.manifest, format, exported))
    for line in _remarks(opened.manifest, format, exported, data, examples):
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    _write(paths, opened.manifest, exported)


def _check_options(
    format: Format,
    data: Path | None,
    *,
    int8_io: bool,
    keep_float: bool,
    max_drop: float | None,
) -> None:
    """Options that contradict each other are said at once."""
    if int8_io and format is not Format.int8:
        raise LocalMisuseError("--int8-io is for --format int8; tflm has int8 input and output anyway.")
    if keep_float and format is not Format.tflm:
        raise LocalMisuseError("--float is for --format tflm.")
    if data is None and (format is Format.int8 or (format is Format.tflm and not keep_float)):
        raise LocalMisuseError(
            f"--format {format.value}: the scales of 8-bit numbers come from recordings: give --data FILE.npz."
        )
    if data is None and max_drop is not None:
        raise LocalMisuseError("--max-drop: the drop is measured on labels: give --data FILE.npz.")


def _targets(manifest: BundleManifest, format: Format, out: Path | None, *, force: bool) -> list[Path]:
    """The files to write: one .tflite, or source and header."""
    stem = "".join(letter if letter.isalnum() else "_" for letter in manifest.name)
    if format is Format.tflm:
        source = out or Path(f"{stem}_model.cc")
        if source.suffix not in (".cc", ".cpp", ".cxx"):
            raise LocalMisuseError(f"--out {source}: expected a .cc file; the .h goes beside it.")
        paths = [source, source.with_suffix(".h")]
    else:
        paths = [out or Path(f"{stem}_{format.value}.tflite")]
    for path in paths:
        if path.exists() and not force:
            raise LocalMisuseError(f"{path} exists: name another with --out, or give --force.")
    return paths


def _with_progress(bundle: ModelBundle, request: ExportRequest, custom: list[Path]) -> Exported:
    """Export, showing what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_out, transient=True, disable=not _out.is_terminal) as progress, quiet_tensorflow():
        from models.export.checked import export_bundle  # noqa: PLC0415

        task = progress.add_task("starting", total=None)
        for path in custom:
            load_python(path)
        return export_bundle(bundle, request, say=lambda text: progress.update(task, description=text))


def _table(manifest: BundleManifest, format: Format, exported: Exported) -> Table:
    """The bundle's own inference and the export, side by side."""
    found = exported.comparison
    measure = {"value": "mean absolute error", "input": "mean loss"}.get(manifest.label.kind, "accuracy")
    points = measure == "accuracy"

    def shown(value: float | None) -> str:
        # + 0.0, because a drop of -0.0 would look like a gain.
        return "not measured" if value is None else f"{round(value, 1) + 0.0:.1f}" if points else f"{value:.4g}"

    def percent(value: float | None) -> float | None:
        return 100 * value if value is not None and points else value

    title = f"{manifest.name} version {manifest.version}, {found.examples} windows, on {exported.runtime}"
    drop = "drop, points" if points else "rise"
    table = Table("model", "bytes", f"{measure}, %" if points else measure, drop, "largest difference", "agreement")
    table.title = title
    table.add_row("bundle's infer", f"{exported.reference_bytes:,}", shown(percent(found.before)), "", "", "")
    agreement = "" if found.agreement is None else f"{100 * found.agreement:.1f} %"
    table.add_row(
        format.value,
        f"{len(exported.graph):,}",
        shown(percent(found.after)),
        "" if found.drop is None else shown(found.drop),
        f"{found.largest_difference:.2g}",
        agreement,
    )
    return table


def _remarks(
    manifest: BundleManifest, format: Format, exported: Exported, data: Path | None, examples: Examples | None
) -> list[str]:
    """What the numbers mean, and what whoever runs the file has to know."""
    lines = []
    if examples is None:
        lines.append("Accuracy was not measured: without --data the two were compared on random windows only.")
    elif exported.comparison.before is None:
        lines.append(f"Accuracy was not measured: {data} holds no labels y.")
    if exported.calibrated_on:
        lines.append(
            f"Calibrated on {exported.calibrated_on} other windows of {data}: the file holds the range of their "
            "activations, which no privacy budget covers; use recordings whose owners agreed to that."
        )
    if exported.output == "logits":
        ending = "sigmoid" if manifest.label.kind == "binary" else "softmax"
        lines.append(f"The output is logits, as the bundle's infer gives them; --probabilities appends the {ending}.")
    if not exported.takes_any_number:
        lines.append("It takes one window a call.")
    if exported.keeps_state:
        lines.append("Its LSTM keeps state from call to call: reset the interpreter's variables before every window.")
    if format is Format.tflm and exported.arena_bytes is None:
        lines.append("TensorFlow Lite Micro itself did not run it: for that, pip install tflite-micro.")
    if exported.arena_bytes is not None:
        lines.append(f"Tensor arena: {exported.arena_bytes:,} bytes on this machine.")
    return lines


def _write(paths: list[Path], manifest: BundleManifest, exported: Exported) -> None:
    """Put the files in place, each whole or not at all."""
    contents = [exported.graph]
    if len(paths) > 1:
        from models.export.c_array import c_source  # noqa: PLC0415 - needs TensorFlow's schema

        text = c_source(
            exported.graph, manifest, stem=paths[0].stem, output=exported.output, arena_bytes=exported.arena_bytes
        )
        contents = [text.source.encode(), text.header.encode()]
    for path, content in zip(paths, contents, strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, mode=0o644)
        except OSError as error:
            raise LocalMisuseError(f"{path} cannot be written ({error.strerror}).") from error
        _out.print(f"{path}: {len(content):,} bytes", highlight=False, soft_wrap=True)
