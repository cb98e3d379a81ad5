"""``covey-aggregator publisher``: keys of publishers, their signatures on bundles, and who has signed.

For machines that have neither the study's database nor its configuration: a publisher's key has no business where the
aggregator's is.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.cli_options import AsJson
from aggregator.command_line import examples, make_group, say_json, say_table
from fl_protocol.adapters.config_files import read_file
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.key_files import create_key, load_key
from fl_protocol.bundle import ExaminedBundle, add_signature, check_derived, examine_bundle, merge_signatures
from fl_protocol.errors import BundleError, ConfigError, LocalMisuseError
from fl_protocol.publishers import Publishers, check_signed
from fl_protocol.signing import public_key_from_hex, public_key_hex
from fl_protocol.terminal import visible

publisher_app = make_group("Publishers, who vouch for models: their keys, and their signatures on bundles.")
Bundle = Annotated[Path, typer.Argument(help="A model bundle, such as model.covey.", show_default=False)]
OnlyThese = Annotated[
    list[str] | None,
    typer.Option(
        "--publisher", metavar="HEX", help="Leave out signatures that are none of this publisher's; may be given again."
    ),
]
_LONGEST_DESCRIPTION = 300


class BundleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be known of a bundle before one signs it.

    Args:
        name, version, description: as it says of itself.
        num_parameters, num_shared_parameters: how many there are, and how many of them are trained in rounds.
        model: SHA-256 of the shared parameters, as ``model show`` and approvals name a version.
        graph: SHA-256 of the graph that devices run.
        manifest: SHA-256 of what publishers sign; the same however many have signed.
        file: SHA-256 of the whole file.
        signatures: how many there are, whosever they are.
    """

    name: str
    version: int
    description: str
    num_parameters: int
    num_shared_parameters: int
    model: str
    graph: str
    manifest: str
    file: str
    signatures: int


class SignedReport(BundleReport, frozen=True, kw_only=True):
    """And who of the publishers that one knows has signed it.

    Args:
        signed_by, not_signed_by: 64 hex digits each.
        threshold: how many of them must have; None where none were named.
        is_enough: whether they have; None where none were named.
    """

    signed_by: list[str]
    not_signed_by: list[str]
    threshold: int | None
    is_enough: bool | None


@publisher_app.command("keygen", epilog=examples("publisher keygen --out publisher.key"))
def publisher_keygen(
    out: Annotated[Path, typer.Option(help="File for the private key; one that is there is never overwritten.")],
) -> None:
    """Make a publisher's key, readable by its owner only; print the public half, which devices and tasks pin."""
    typer.echo(public_key_hex(create_key(out).public_key()))


@publisher_app.command(
    "sign",
    epilog=examples(
        "publisher sign model.covey --key publisher.key",
        "publisher sign model.covey --key publisher.key --expect-digest MODEL_SHA256 --origin watch_features.covey",
    ),
)
def publisher_sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="The publisher's key file.")],
    expect_digest: Annotated[
        str | None,
        typer.Option(metavar="SHA256", help="Sign only the model with this digest, as `model show` prints it."),
    ] = None,
    origin: Annotated[
        Path | None,
        typer.Option(help="A bundle that you trust: sign only what training from it can give, its graph and all."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the signed bundle. Default: in place of BUNDLE.")] = None,
    publisher: OnlyThese = None,
) -> None:
    """Put one more signature on a bundle, and say what is signed; no database or configuration is needed.

    What a digest does not say is whether the graph is the one that was agreed to; --origin does.
    """
    signer, data = load_key(key), read_file(bundle, "BUNDLE")
    examined = examine_bundle(data)
    report = _report(data, examined)
    _say(f"{bundle}, to be signed by {public_key_hex(signer.public_key())}", report)
    if expect_digest is not None and expect_digest.strip().lower() != report.model:
        raise BundleError(
            f"--expect-digest: expected the model {expect_digest.strip()[:80]}, and the one in {bundle} is "
            f"{report.model}; nothing was signed: export the version that was approved"
        )
    if origin is not None:
        check_derived(examined.bundle, examine_bundle(read_file(origin, "--origin")).bundle)
    signed = add_signature(data, signer, only=_keys(publisher))
    target = out if out is not None else bundle
    _write(target, signed, like=bundle)
    typer.echo(f"{target}: signed; it has {len(examine_bundle(signed).signatures)} signatures")


@publisher_app.command("merge", epilog=examples("publisher merge anna.covey ben.covey --out model.covey"))
def publisher_merge(
    bundles: Annotated[list[Path], typer.Argument(help="Copies of one bundle that publishers signed apart.")],
    out: Annotated[Path, typer.Option(help="File for the bundle with all their signatures.")],
    publisher: OnlyThese = None,
) -> None:
    """Put the signatures of copies of one bundle together; whose they are, `publisher show` tells."""
    first, *others = (read_file(bundle, "BUNDLES") for bundle in bundles)
    merged = merge_signatures(first, others, only=_keys(publisher))
    _write(out, merged, like=bundles[0])
    typer.echo(f"{out}: it has {len(examine_bundle(merged).signatures)} signatures")


@publisher_app.command(
    "show",
    epilog=examples(
        "publisher show model.covey",
        "publisher show model.covey --publisher HEX --publisher HEX --publisher HEX --threshold 2",
        "publisher show model.covey --publisher HEX --json",
    ),
)
def publisher_show(
    bundle: Bundle,
    publisher: Annotated[
        list[str] | None, typer.Option(metavar="HEX", help="Public key of a publisher; may be given again.")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=1, help="How many of them must have signed. Default: all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a bundle, and who of the given publishers has signed it; exit code 4 if too few have."""
    data = read_file(bundle, "BUNDLE")
    examined, publishers = examine_bundle(data), _named(publisher or [], threshold)
    keys = publishers.keys if publishers is not None else ()
    signed = examined.signers(keys)
    report = SignedReport(
        **msgspec.structs.asdict(_report(data, examined)),
        signed_by=[public_key_hex(one) for one in signed],
        not_signed_by=[public_key_hex(one) for one in keys if one not in signed],
        threshold=publishers.threshold if publishers is not None else None,
        is_enough=len(signed) >= publishers.threshold if publishers is not None else None,
    )
    if as_json:
        say_json(report)
    else:
        _say(str(bundle), report)
    if publishers is not None:
        check_signed(publishers, examined.signed, examined.signatures)


def _named(keys: list[str], threshold: int | None) -> Publishers | None:
    """The publishers that the options name; None where there are none. Raises ConfigError."""
    if not keys:
        if threshold is not None:
            raise ConfigError("--threshold: expected --publisher HEX with it, for each publisher that may sign")
        return None
    found = _keys(keys)
    try:
        return Publishers(found, len(found) if threshold is None else threshold)
    except LocalMisuseError as error:
        raise ConfigError(f"--publisher: {error}") from error


def _keys(keys: list[str] | None) -> tuple[Ed25519PublicKey, ...]:
    """Public keys of an option. Raises ConfigError."""
    try:
        return tuple(public_key_from_hex(key) for key in keys or ())
    except LocalMisuseError as error:
        raise ConfigError(f"--publisher: {error}") from error


def _report(data: bytes, examined: ExaminedBundle) -> BundleReport:
    """What is to be known of a bundle."""
    manifest = examined.bundle.manifest
    return BundleReport(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        num_parameters=manifest.num_parameters,
        num_shared_parameters=manifest.num_shared_parameters,
        model=examined.bundle.shared_digest.hex(),
        graph=examined.bundle.graph_digest.hex(),
        manifest=examined.manifest_digest.hex(),
        file=hashlib.sha256(data).hexdigest(),
        signatures=len(examined.signatures),
    )


def _say(title: str, report: BundleReport) -> None:
    """Print a report as a table."""
    rows: list[tuple[str, object]] = [
        # Security: a bundle that nobody vouches for yet must not write over the digests that its signer reads.
        ("name", visible(report.name)),
        ("version", str(report.version)),
        ("description", visible(report.description[:_LONGEST_DESCRIPTION])),
        ("parameters", f"{report.num_parameters}, {report.num_shared_parameters} of them shared"),
        ("model SHA-256", f"{report.model} (shared parameters, as model show and approvals name them)"),
        ("graph SHA-256", f"{report.graph} (what devices run)"),
        ("signed SHA-256", f"{report.manifest} (what publishers sign)"),
        ("file SHA-256", report.file),
        ("signatures", str(report.signatures)),
    ]
    if isinstance(report, SignedReport):
        rows += [("signed by", key) for key in report.signed_by]
        rows += [("not signed by", key) for key in report.not_signed_by]
        if report.threshold is not None:
            needed = f"{len(report.signed_by)} of the {report.threshold} that are needed"
            rows.append(("enough", f"{'yes' if report.is_enough else 'no'}: {needed}"))
    say_table(title, ("what", "value"), rows)


def _write(path: Path, data: bytes, *, like: Path) -> None:
    """Replace a file, with the access that `like` gives. Raises ConfigError."""
    try:
        write_atomic(path, data, mode=stat.S_IMODE(like.stat().st_mode))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from error
