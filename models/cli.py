"""The command ``covey-model``: build, list and inspect model bundles. TensorFlow is imported only by what needs it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError, CoveyError, LocalMisuseError
from models import catalog, publisher

_EPILOG = """Examples:

covey-model key publisher.key

covey-model build watch_features --out watch_features.covey --key publisher.key

covey-model build all --out-dir models/bundles

covey-model inspect models/bundles/watch_cnn.covey --publisher models/bundles/publisher.pub"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    epilog=_EPILOG,
    help="Build, list and inspect the model bundles (*.covey) that devices train.",
)
_out = Console()


def main() -> None:
    """Entry point; every error of ours is one sentence on standard error."""
    try:
        app(prog_name="covey-model")
    except CoveyError as error:
        Console(stderr=True).print(f"covey-model: {error}", markup=False, highlight=False, soft_wrap=True)
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
def list_models() -> None:
    """The models that can be built."""
    table = Table("model", "what it is")
    for name, text in catalog.MODELS.items():
        table.add_row(name, text)
    _out.print(table)


@app.command()
def key(
    path: Annotated[Path, typer.Argument(metavar="KEYFILE", help="Private key to make; must not exist.")],
) -> None:
    """Make a publisher's signing key. Whoever has it can give devices new models: keep it offline."""
    publisher.create_key(path)
    _out.print(f"{path}: keep it secret; builds that use it write {publisher.PUBLIC_KEY_FILE}.", soft_wrap=True)


@app.command()
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the list, or all.")],
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
) -> None:
    """Convert, package and sign a model; publisher.pub, which devices pin, is written beside it."""
    names = list(catalog.MODELS) if name == "all" else [name]
    if (out is None) == (out_dir is None) or (out is not None and name == "all"):
        raise LocalMisuseError("build: give --out FILE for one model, or --out-dir FOLDER.")
    with _quiet_tensorflow():
        specs = [catalog.load(each) for each in names]
    signer = publisher.load_key(key) if key else Ed25519PrivateKey.generate()
    with _quiet_tensorflow():
        from models.build import build_bundle  # noqa: PLC0415 - slow: only once the arguments are known to be good
    for spec in specs:
        path = out or (out_dir or Path()) / f"{spec.name}.covey"
        with _quiet_tensorflow():
            data = build_bundle(spec, publisher_key=signer, batch_size=batch_size, version=version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        _out.print(f"{path}: {len(data)} bytes, version {version}", highlight=False, soft_wrap=True)
    public = publisher.write_public_key(signer, path.parent)
    _out.print(f"{public}: devices pin this key", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .covey file.")],
    *,
    publisher_key: Annotated[
        Path | None, typer.Option("--publisher", help="Public key file; else publisher.pub beside the bundle.")
    ] = None,
) -> None:
    """Verify a bundle and show what is in it."""
    trusted = publisher.load_public_key(publisher_key or bundle.parent / publisher.PUBLIC_KEY_FILE)
    try:
        data = bundle.read_bytes()
    except OSError as error:
        raise BundleError(f"The bundle {bundle} cannot be read ({error.strerror}).") from error
    opened = open_bundle(data, publisher=trusted)
    with _quiet_tensorflow():
        from models.report import describe  # noqa: PLC0415 - slow: reads the graph with TensorFlow's schema
    for part in describe(opened, size_bytes=len(data)):
        _out.print(part)


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Drop what TensorFlow's C++ prints on import and conversion; its failures are exceptions as well."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


if __name__ == "__main__":
    main()
