"""The command ``covey-model``: build, list and inspect model bundles. TensorFlow is imported only by what needs it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from fl_protocol.adapters import key_files
from fl_protocol.errors import BundleError, CoveyError, LocalMisuseError
from fl_protocol.model_manifest import ClipGroup
from fl_protocol.terminal import visible
from models import catalog, output_files, publisher
from models.cli_export import export
from models.cli_train import train
from models.quiet import quiet_tensorflow
from models.sources import Description, load_spec

_EPILOG = """Examples:

covey-model key publisher.key

covey-model build watch_features --out watch_features.covey --key publisher.key

covey-model build my_model.py:make_model --out my.covey --key publisher.key --labels rest,walk,run

covey-model build all --out-dir models/bundles

covey-model inspect my.covey --verify publisher.pub

covey-model train my.covey --data windows.npz --epochs 20 --epsilon 3 --out trained.covey --key publisher.key

covey-model export trained.covey --format int8 --data windows.npz"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    epilog=_EPILOG,
    help="Build, inspect, train and export the model bundles (*.covey) that devices train.",
)
_out = Console()


def main() -> None:
    """Entry point; every error of ours is one sentence on standard error."""
    try:
        app(prog_name="covey-model")
    except CoveyError as error:
        Console(stderr=True).print(visible(f"covey-model: {error}"), markup=False, highlight=False, soft_wrap=True)
        sys.exit(4 if isinstance(error, BundleError) else 1)


def _print_version(wanted: bool) -> None:
    """Say which software this is, and stop."""
    if wanted:
        try:
            _out.print(f"covey-model {version('covey')}", highlight=False)
        except PackageNotFoundError:
            _out.print("covey-model (not installed)", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False) -> None:
    """The models that can be built."""
    if as_json:
        rows = [{"model": name, "what it is": text} for name, text in catalog.MODELS.items()]
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    table = Table("model", "what it is")
    for name, text in catalog.MODELS.items():
        table.add_row(name, text)
    _out.print(table)


@app.command()
def key(
    path: Annotated[Path, typer.Argument(metavar="KEYFILE", help="Private key to make; must not exist.")],
) -> None:
    """Make a publisher's signing key. Whoever has it can give devices new models: keep it offline."""
    key_files.create_key(path)
    _out.print(
        f"{path}: keep it secret; builds that use it write {publisher.PUBLIC_KEY_FILE}.", soft_wrap=True, markup=False
    )


@app.command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model of the list, all, FILE.py:FUNCTION, or a saved Keras model (.keras).",
        ),
    ],
    *,
    out: Annotated[Path | None, typer.Option(help="The .covey file to write (one model).")] = None,
    out_dir: Annotated[Path | None, typer.Option(help="Folder for NAME.covey.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="KEYFILE",
            help="Sign with this key. Without it a fresh key signs this one build and is forgotten.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Static batch dimension of the graph.")] = 32,
    version: Annotated[int, typer.Option(min=0, help="Bundle version; devices refuse a lower one.")] = 1,
    name: Annotated[str | None, typer.Option(help="Name in the bundle (default: the model's).")] = None,
    description: Annotated[str | None, typer.Option(help="What the model is for.")] = None,
    data: Annotated[str | None, typer.Option(help="Which recordings it is for or from, and their licence.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="softmax_cross_entropy, binary_cross_entropy, mean_squared_error, huber or huber:DELTA "
            "(default: the compiled one)."
        ),
    ] = None,
    autoencoder: Annotated[bool, typer.Option("--autoencoder", help="The target is the input itself.")] = False,
    labels: Annotated[str, typer.Option(help="Names of the classes or values, with commas between.")] = "",
    label_units: Annotated[str, typer.Option(help="Units of the values, with commas between.")] = "",
    tolerance: Annotated[float | None, typer.Option(help="A value off by at most this counts as correct.")] = None,
    channels: Annotated[str, typer.Option(help="Names of the input's last axis, with commas between.")] = "",
    units: Annotated[str, typer.Option(help="Units of the channels, with commas between.")] = "",
    sampling_rate: Annotated[float | None, typer.Option(metavar="HZ", help="Samples per second of the input.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default for tasks.")] = None,
    l2_norm_clip: Annotated[float | None, typer.Option(help="Default for tasks.")] = None,
    personal: Annotated[str, typer.Option(help="Layers that stay on the device, with commas between.")] = "",
    clip_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER,LAYER=SHARE",
            help="Layers that are clipped together, to SHARE of the clip; repeat for every group. The squares of the "
            "shares add up to 1. Without it, one flat clip.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another publisher's publisher.pub.")] = False,
) -> None:
    """Convert, package and sign a model; publisher.pub, which devices pin, is written beside it."""
    sources = list(catalog.MODELS) if source == "all" else [source]
    if (out is None) == (out_dir is None) or (out is not None and source == "all"):
        raise LocalMisuseError("build: give --out FILE for one model, or --out-dir FOLDER.")
    if source == "all" and name:
        raise LocalMisuseError("build all: --name would write every model to one file; leave it out.")
    said = Description(
        name=name,
        description=description,
        data=data,
        loss=loss,
        label_kind="input" if autoencoder else None,
        labels=_listed(labels),
        label_units=_listed(label_units),
        tolerance=tolerance,
        channels=_listed(channels),
        units=_listed(units),
        sampling_rate_hz=sampling_rate,
        learning_rate=learning_rate,
        l2_norm_clip=l2_norm_clip,
        personal_layers=_listed(personal),
        norm_clips=tuple(_clip_group(each) for each in clip_group or ()),
    )
    signer = key_files.load_key(key) if key else Ed25519PrivateKey.generate()
    folder = out.parent if out else out_dir or Path()
    if out:
        output_files.check_targets([out], others=[key] if key else [], force=True)
    output_files.make_folder(folder)
    publisher.check_public_key(folder, signer, force=force)
    for each in sources:
        path = _build_one(each, said, signer, out=out, out_dir=out_dir, batch_size=batch_size, version=version)
    public = publisher.write_public_key(signer, path.parent)
    _out.print(f"{public}: devices pin this key", highlight=False, soft_wrap=True, markup=False)


def _build_one(
    source: str,
    said: Description,
    signer: Ed25519PrivateKey,
    *,
    out: Path | None,
    out_dir: Path | None,
    batch_size: int,
    version: int,
) -> Path:
    """Build the model of one source, and say what came out."""
    with _out.status(f"building {Path(source).name} (up to a minute)"), quiet_tensorflow():
        from models.build import build_bundle  # noqa: PLC0415 - slow: only once the arguments are known to be good

        spec = load_spec(source, said)
        bundle = build_bundle(spec, publisher_key=signer, batch_size=batch_size, version=version)
    path = out or (out_dir or Path()) / f"{spec.name}.covey"
    output_files.write(path, bundle)
    _out.print(f"{path}: {len(bundle)} bytes, version {version}", highlight=False, soft_wrap=True, markup=False)
    return path


def _listed(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _clip_group(text: str) -> ClipGroup:
    """``LAYER,LAYER=SHARE``."""
    layers, _, share = text.rpartition("=")
    try:
        return ClipGroup(_listed(layers), float(share))
    except ValueError:
        raise LocalMisuseError(f"--clip-group {text}: expected LAYER,LAYER=SHARE, such as conv1,conv2=0.6.") from None


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .covey file.")],
    *,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="KEYFILE", help="The publisher's public key (default: publisher.pub beside the bundle)."),
    ] = None,
) -> None:
    """Verify a bundle, before anything in it is read, and show what it holds."""
    opened = publisher.opened(bundle, verify)
    key_file = verify or bundle.parent / publisher.PUBLIC_KEY_FILE
    trusted = publisher.load_public_key(key_file)
    with quiet_tensorflow():
        from models.report import describe  # noqa: PLC0415 - slow: reads the graph with TensorFlow's schema
    for part in describe(opened, size_bytes=bundle.stat().st_size, publisher=trusted, key_file=key_file.name):
        _out.print(part)


app.command()(export)
app.command()(train)


if __name__ == "__main__":
    main()
