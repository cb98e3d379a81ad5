"""The command ``covey-helper`` (typer and rich)."""

from __future__ import annotations

import signal
import time
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives import hashes

from aggregator.command_line import make_app, moment, run_app, say_json, say_table, span
from aggregator.errors import DatabaseError
from aggregator.helper.answer_ledger import LedgerError
from aggregator.helper.assembly import HelperFiles, assemble, serving_https
from aggregator.helper.cli_devices import device_app
from aggregator.helper.cli_logs import log_app
from aggregator.helper.cli_options import AsJson, Config, examples, opened
from aggregator.helper.helper_store import HelperStore
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.errors import ConfigError, CoveyError
from fl_protocol.signing import public_key_hex

_EXIT_CODES: list[tuple[type[CoveyError], int]] = [
    (ConfigError, 2),
    (LedgerError, 1),
    (DatabaseError, 3),
    (CoveyError, 1),
]
_HELP = """Help studies of other organisations: add up masks of listed updates, once for each round.

A helper never sees an update. As long as it answers a round for one list only, nobody else sees a single one either.

Examples:

  covey-helper init --config helper.toml

  covey-helper device import devices.csv --config helper.toml --tenant clinic

  covey-helper run --config helper.toml

  covey-helper status --config helper.toml

  covey-helper audit --config helper.toml

Exit codes: 0 done, 1 other error or a ledger that was changed, 2 usage or configuration, 3 database.
"""

app = make_app("covey-helper", _HELP)
app.add_typer(device_app, name="device")
app.add_typer(log_app, name="log")


def main() -> None:
    """Entry point."""
    run_app(app, "covey-helper", _EXIT_CODES)


@app.command(epilog=examples("init --config helper.toml"))
def init(config: Config) -> None:
    """Make the identity and the store where there are none; print the public key, and the pin for others' files.

    The second line goes into `helper = [...]` of device.toml's [[study]] and of the aggregator's task file.
    """
    helper = HelperFiles.load(config).create()
    key = public_key_hex(helper.identity.public_key())
    typer.echo(key)
    typer.echo(f'{{ name = "{helper.name}", operator = "{helper.operator}", key = "{key}" }}')


@app.command(epilog=examples("run --config helper.toml"))
def run(config: Config) -> None:
    """Answer requests until stopped; one JSON line per event on standard output. May be killed at any moment."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    files = HelperFiles.load(config)
    service = assemble(files, journal=JsonLines())
    with serving_https(files, service):
        service.run(lambda: bool(stop))


@app.command(epilog=examples("status --config helper.toml", "status --config helper.toml --json"))
def status(config: Config, as_json: AsJson = False) -> None:
    """Show keys and when they end, rounds answered, refusals by reason, and devices known."""
    with opened(config) as (files, store):
        found = _status(files, store)
    if as_json:
        say_json(found)
    else:
        _show_status(found, time.time())


@app.command(
    epilog=examples(
        "audit --config helper.toml",
        "audit --config helper.toml --task exercises --json",
        "audit --config helper.toml --noted DIGEST_HEX",
    )
)
def audit(
    config: Config,
    task: Annotated[str | None, typer.Option(help="Show rounds and refusals of this task only.")] = None,
    noted: Annotated[
        str | None, typer.Option(help="A `chain` that the journal told once; it must still be in the ledger.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every answered round and every kept refusal, and check that no answered round was edited or removed.

    A store that was put back as a whole to an earlier day passes, unless a later digest is given as --noted.
    """
    with opened(config) as (files, store):
        identity = files.helper().identity.public_key()
        found = _audit(store, task)
        fault = ""
        try:
            store.answers.check(identity)
        except LedgerError as error:
            fault = error.fault
    if not fault and noted is not None and noted.lower() not in found["chains"]:
        fault = f"{noted} is in no row: the store was put back to an earlier day, or the digest is another helper's"
    if as_json:
        say_json({"answers": found["answers"], "refusals": found["refusals"], "fault": fault})
    else:
        _show_audit(found)
        typer.echo(f"BROKEN: {fault}" if fault else f"chain verified; rounds answered so far: {len(found['chains'])}")
    if fault:
        raise typer.Exit(1)


def _status(files: HelperFiles, store: HelperStore) -> dict[str, Any]:
    """What `status` tells."""
    helper, answered, devices = files.helper(), store.answers.counts(), store.devices.counts()
    return {
        "name": helper.name,
        "operator": helper.operator,
        "identity": public_key_hex(helper.identity.public_key()),
        "minimum_cohort": files.config.helper.minimum_cohort,
        "studies": [
            {
                "tenant": one.tenant,
                "answered": answered.get(one.tenant, 0),
                "devices": devices.get(one.tenant, 0),
                "allow_listed": one.allow_listed,
                "cas": [ca.fingerprint(hashes.SHA256()).hex() for ca in one.cas],
            }
            for one in files.studies()
        ],
        "keys": [
            {"number": one.number, "kem": one.kem, "made_s": one.made_s, "not_after_s": one.not_after_s}
            for one in store.keys.all()
            if one.secret is not None
        ],
        "erased_keys": sum(one.secret is None for one in store.keys.all()),
        "refusals": store.refusals.counts(),
    }


def _show_status(found: dict[str, Any], now_s: float) -> None:
    """Print a status for people."""
    typer.echo(f"{found['name']} of {found['operator']}, identity {found['identity']}")
    typer.echo(f"adds up at least {found['minimum_cohort']} updates")
    rows = [
        (one["tenant"], one["answered"], one["devices"] if one["allow_listed"] else "not asked")
        for one in found["studies"]
    ]
    say_table("Studies", ("study", "rounds answered", "devices listed"), rows)
    for one in found["studies"]:
        for fingerprint in one["cas"]:
            typer.echo(f"{one['tenant']}: knows pseudonyms by the CA with SHA-256 {fingerprint}")
    keys = [
        (one["number"], one["kem"], moment(one["made_s"]), _ends(one["not_after_s"], now_s)) for one in found["keys"]
    ]
    say_table("Keys", ("key", "kind", "made", "for rounds until"), keys)
    typer.echo(f"keys erased: {found['erased_keys']}")
    for reason, times in found["refusals"].items():
        typer.echo(f"refused: {reason.replace('_', ' ')}: {times}")


def _ends(not_after_s: float, now_s: float) -> str:
    """When a key ends, for people."""
    left_s = not_after_s - now_s
    return f"{moment(not_after_s)} ({'in ' + span(left_s) if left_s >= 0 else span(-left_s) + ' ago'})"


def _audit(store: HelperStore, task: str | None) -> dict[str, Any]:
    """What `audit` tells, of one task or of all; the chain is of all."""
    rows = store.answers.all()
    return {
        "answers": [
            {
                "tenant": one.tenant,
                "task": one.task,
                "round": one.round,
                "answered_s": one.answered_s,
                "manifest": one.manifest_digest.hex(),
                "updates": one.count,
                "included": one.included_digest.hex(),
                "chain": chain.hex(),
            }
            for one, chain in rows
            if task in {None, one.task}
        ],
        "refusals": [vars(one) for one in store.refusals.all() if task in {None, one.task}],
        "chains": {chain.hex() for _, chain in rows},
    }


def _show_audit(found: dict[str, Any]) -> None:
    """Print an audit for people; digests are cut short, --json has them whole."""
    rows = [
        (
            moment(one["answered_s"]),
            f"{one['tenant']}/{one['task']}",
            one["round"],
            one["updates"],
            *(one[name][:16] for name in ("manifest", "included", "chain")),
        )
        for one in found["answers"]
    ]
    say_table("Answered", ("when", "task", "round", "updates", "manifest", "list", "chain"), rows)
    refused = [
        (moment(one["at_s"]), f"{one['tenant']}/{one['task']}", one["round"], one["reason"], one["detail"])
        for one in found["refusals"]
    ]
    say_table("Refused", ("when", "task", "round", "reason", "detail"), refused)


if __name__ == "__main__":
    main()
