"""``covey-aggregator audit``: what was done, and whether the log of it is what was signed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.assembly import AggregatorFiles
from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import Note, origin_of, parse_note
from aggregator.audit.entries import AuditEntry
from aggregator.audit.entry_proofs import CheckedEntry, ProofRefusedError, check_entry, prove_entry
from aggregator.audit.export import export_log, verify_database, verify_file
from aggregator.audit.verification import LogKeys, Verified
from aggregator.cli_options import AsJson, Config, opened, write_files
from aggregator.command_line import examples, make_group, moment, progress_bar, say_json, say_table
from fl_protocol.adapters.config_files import read_file
from fl_protocol.errors import ConfigError
from fl_protocol.helper_config import pinned
from fl_protocol.signing import public_key_from_hex

audit_app = make_group("The audit log: what was done, and proof of it.")
HelperKeys = Annotated[
    list[str], typer.Option("--helper-key", help="Public key of a helper, 64 hex digits; repeatable.")
]
AggregatorKey = Annotated[
    str | None, typer.Option("--aggregator-key", help="The aggregator's public key, 64 hex digits.")
]


@audit_app.command(
    "list",
    epilog=examples(
        "audit list --config aggregator.toml",
        "audit list --config aggregator.toml --actor local:anna --action task. --limit 20",
        "audit list --config aggregator.toml --subject watch/12 --json",
    ),
)
def audit_list(
    config: Config,
    actor: Annotated[str | None, typer.Option(help="Only what this one did.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, or with a dot at its end all that begin so.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only what was done to this: task, TASK/ROUND, device.")] = None,
    before: Annotated[int | None, typer.Option(min=0, help="Only entries with a lower number.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List entries, newest first."""
    with opened(config) as (_, store):
        found = store.audit.page(before=before, limit=limit, actor=actor, action=action, subject=subject)
    if as_json:
        say_json(found)
        return
    say_table("Audit log", ("entry", "when", "who", "what", "on", "detail"), [_row(one) for one in found])
    if len(found) == limit:
        typer.echo(f"older ones: --before {found[-1].number}")


@audit_app.command(
    "verify",
    epilog=examples(
        "audit verify --config aggregator.toml",
        "audit verify log.jsonl --tenant clinic --aggregator-key KEY_HEX --helper-key KEY_HEX",
        "audit verify --config aggregator.toml --checkpoint kept.note --json",
    ),
)
def audit_verify(
    export: Annotated[Path | None, typer.Argument(help="What `audit export` wrote; default: the database.")] = None,
    config: Annotated[Path | None, typer.Option(help="Path of aggregator.toml.")] = None,
    tenant: Annotated[str | None, typer.Option(help="The study; default: the configuration's.")] = None,
    aggregator_key: AggregatorKey = None,
    helper_key: HelperKeys = [],  # noqa: B006
    checkpoint: Annotated[
        list[Path], typer.Option(help="A checkpoint that was kept elsewhere, and has to fit too; repeatable.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check every entry, the chain, and every checkpoint with its signatures; exit code 1 if something does not hold.

    Keys that are given take the place of the configuration's.
    """
    keys = _keys(config, tenant, aggregator_key, helper_key)
    kept = [_kept(path) for path in checkpoint]
    with progress_bar() as tell:
        if export is not None:
            found = verify_file(export, keys, kept=kept, progress=partial(tell, "verifying"))
        elif config is not None:
            with opened(config) as (_, store):
                found = verify_database(store.database, keys, kept=kept, progress=partial(tell, "verifying"))
        else:
            raise ConfigError("expected --config, or a file that audit export wrote")
    if as_json:
        say_json(found)
    else:
        _say_verified(found)
    if found.fault is not None:
        raise typer.Exit(1)


@audit_app.command("export", epilog=examples("audit export --config aggregator.toml --out log.jsonl"))
def audit_export(config: Config, out: Annotated[Path, typer.Option(help="File to write; it must not exist.")]) -> None:
    """Write all entries and checkpoints to a file, which `audit verify` takes anywhere."""
    with opened(config) as (files, store), progress_bar() as tell:
        try:
            with out.open("xb") as file:
                count = export_log(store.database, _origin(files), file, progress=partial(tell, "exporting"))
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from error
    typer.echo(f"{out}: {count} entries")


@audit_app.command(
    "prove",
    epilog=examples(
        "audit prove 1234 --config aggregator.toml --out entry.json",
        "audit check entry.json --helper-key KEY_HEX",
    ),
)
def audit_prove(
    number: Annotated[int, typer.Argument(min=0, help="Of the entry.")],
    config: Config,
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
) -> None:
    """Write one entry with its path, a checkpoint and all co-signatures; `audit check` needs no more than that."""
    with opened(config) as (_, store):
        proof = prove_entry(store.database, number)
    if out is None:
        say_json(proof)
        return
    write_files(out.parent, {out.name: msgspec.json.format(msgspec.json.encode(proof)) + b"\n"})
    typer.echo(str(out))


@audit_app.command(
    "check",
    epilog=examples(
        "audit check entry.json --helper-key KEY_HEX --helper-key KEY_HEX",
        "audit check entry.json --helper-key KEY_HEX --aggregator-key KEY_HEX --json",
    ),
)
def audit_check(
    proof: Annotated[Path, typer.Argument(help="What `audit prove` wrote.")],
    helper_key: HelperKeys = [],  # noqa: B006
    aggregator_key: AggregatorKey = None,
    as_json: AsJson = False,
) -> None:
    """Check the proof of an entry, without any database; exit code 1 if it proves nothing. All keys must have signed.

    Without --aggregator-key the helpers' signatures count alone.
    """
    if not helper_key and aggregator_key is None:
        raise ConfigError("expected --helper-key or --aggregator-key: a proof is worth what its signers are")
    data = read_file(proof, "PROOF")
    aggregator = None if aggregator_key is None else public_key_from_hex(aggregator_key)
    helpers = [public_key_from_hex(one) for one in helper_key]
    try:
        found = check_entry(data, aggregator=aggregator, helpers=helpers)
    except ProofRefusedError as error:
        if as_json:
            say_json({"outcome": error.outcome, "detail": error.detail})
        else:
            typer.echo(f"DOES NOT HOLD: {error.outcome}: {error.detail}")
        raise typer.Exit(1) from error
    if as_json:
        say_json({"outcome": "proved", **msgspec.to_builtins(found)})
    else:
        _say_proved(found)


@audit_app.command(
    "checkpoint",
    epilog=examples(
        "audit checkpoint --config aggregator.toml", "audit checkpoint --config aggregator.toml --out kept.note"
    ),
)
def audit_checkpoint(
    config: Config, out: Annotated[Path | None, typer.Option(help="File to write it to, to be kept elsewhere.")] = None
) -> None:
    """Sign the log as it is, and show the newest checkpoint; a running coordinator has helpers co-sign it."""
    with opened(config) as (files, store):
        checkpoints = Checkpoints(store.database, _origin(files))
        note = checkpoints.make(files.signing_key(), now_s=time.time()) or checkpoints.newest()
    if note is None:
        typer.echo("the audit log is empty; there is nothing to sign")
    elif out is None:
        typer.echo(note.text, nl=False)
    else:
        write_files(out.parent, {out.name: note.text.encode()})
        typer.echo(str(out))


def _origin(files: AggregatorFiles) -> str:
    """The name of the configured study's log."""
    return origin_of(files.config.aggregator.tenant)


def _keys(config: Path | None, tenant: str | None, aggregator_key: str | None, helper_keys: list[str]) -> LogKeys:
    """Whom a log is verified against: what is given, or else what the configuration says."""
    if config is None and (tenant is None or aggregator_key is None):
        raise ConfigError("expected --config, or both --tenant and --aggregator-key")
    files = None if config is None else AggregatorFiles.load(config)
    helpers: dict[str, Ed25519PublicKey] = {one: public_key_from_hex(one) for one in helper_keys}
    if not helpers and files is not None:
        helpers = {name: one.key for name, one in pinned(files.config.helpers).items()}
    origin = _origin(files) if files is not None and tenant is None else origin_of(tenant or "")
    if files is None or aggregator_key is not None:
        return LogKeys(origin, public_key_from_hex(aggregator_key or ""), helpers)
    return LogKeys(origin, files.signing_key().public_key(), helpers)


def _kept(path: Path) -> Note:
    """A checkpoint in a file."""
    return parse_note(read_file(path, "--checkpoint"))


def _row(entry: AuditEntry) -> tuple[object, ...]:
    """An entry's line."""
    detail = ", ".join(f"{name} {value}" for name, value in entry.detail.items())
    return str(entry.number), moment(entry.at_s), entry.actor, entry.action, entry.subject, detail


def _say_verified(found: Verified) -> None:
    """What was found, for people."""
    if found.fault is not None:
        typer.echo(f"DOES NOT HOLD: {found.fault.outcome}: {found.fault.detail}")
    typer.echo(f"{'held so far' if found.fault else 'holds'}: {found.entries} entries, {found.checkpoints} checkpoints")
    for name, size in found.cosigned.items():
        typer.echo(f"helper {name} has co-signed {f'the first {size}' if size else 'none of them'}")
    if not found.fault and found.covered < found.entries:
        typer.echo(f"the last {found.entries - found.covered} are under no checkpoint yet: the chain alone holds them")


def _say_proved(found: CheckedEntry) -> None:
    """A proved entry, for people."""
    entry = found.entry
    names = ("entry", "when", "who", "what", "on", "detail")
    say_table(f"In the log {found.origin}", ("what", "value"), list(zip(names, _row(entry), strict=True)))
    typer.echo(f"proved: it is in the first {found.size} entries of {found.origin}")
    for key, at_s in found.cosigned_s.items():
        typer.echo(f"co-signed {moment(at_s)} with {key}")
