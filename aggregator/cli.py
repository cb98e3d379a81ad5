"""The command ``covey-aggregator`` (typer and rich)."""

from __future__ import annotations

import gc
import signal
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from aggregator.adapters.prometheus import CountingJournal, Probes, serve_metrics
from aggregator.adapters.study_metrics import StudyMetrics
from aggregator.alerts.assembly import telling, webhooks_of
from aggregator.api.audit_book import AuditBook
from aggregator.assembly import AggregatorFiles, assemble
from aggregator.cli_accounts import account_app, token_app
from aggregator.cli_api import register as register_api
from aggregator.cli_audit import audit_app
from aggregator.cli_backup import register as register_backup
from aggregator.cli_broker import broker_app
from aggregator.cli_ca import ca_app
from aggregator.cli_devices import device_app
from aggregator.cli_enrolment import enrolment_app
from aggregator.cli_enrolment import token_app as enroll_token_app
from aggregator.cli_models import model_app
from aggregator.cli_options import AsJson, Config, opened
from aggregator.cli_privacy import privacy_app
from aggregator.cli_publisher import publisher_app
from aggregator.cli_tasks import task_app
from aggregator.cli_upgrade import register as register_upgrade
from aggregator.cli_watch import register as register_watch
from aggregator.cli_webhooks import webhook_app
from aggregator.command_line import examples, make_app, plain_console, run_app, say_json
from aggregator.errors import DatabaseError
from aggregator.heartbeat import Heartbeat
from aggregator.overview import overview
from aggregator.overview_screen import print_overview
from aggregator.worker_files import worker_files
from fl_protocol.adapters.journal import Journal, JsonLines
from fl_protocol.errors import BundleError, ConfigError, CoveyError
from fl_protocol.helper_config import pinned
from fl_protocol.signing import public_key_hex

_EXIT_CODES: list[tuple[type[CoveyError], int]] = [
    (ConfigError, 2),
    (DatabaseError, 3),
    (BundleError, 4),
    (CoveyError, 1),
]
_HELP = """Run tasks: open rounds, add up sealed updates, sign and publish the next model.

Examples:

  covey-aggregator init --config aggregator.toml

  covey-aggregator task create exercises.toml --config aggregator.toml

  covey-aggregator device add --config aggregator.toml watch-7 PUBLIC_KEY_HEX

  covey-aggregator run --config aggregator.toml

  covey-aggregator status --config aggregator.toml

  covey-aggregator watch --config aggregator.toml

  covey-aggregator task show exercises --config aggregator.toml

  covey-aggregator model export exercises --config aggregator.toml --out model

  covey-aggregator publisher sign model/model.covey --key publisher.key

  covey-aggregator audit verify --config aggregator.toml

  covey-aggregator privacy plan --epsilon 2 --delta 1e-6 --devices 5000 --rounds 200

Exit codes: 0 done, 1 other error, 2 usage or configuration, 3 database, 4 model bundle.
"""

app = make_app("covey-aggregator", _HELP)
for _name, _group in (
    ("task", task_app),
    ("model", model_app),
    ("publisher", publisher_app),
    ("privacy", privacy_app),
    ("device", device_app),
    ("ca", ca_app),
    ("broker", broker_app),
    ("enrolment", enrolment_app),
    ("enroll-token", enroll_token_app),
    ("audit", audit_app),
    ("account", account_app),
    ("token", token_app),
    ("webhook", webhook_app),
):
    app.add_typer(_group, name=_name)
register_backup(app)
register_upgrade(app)
register_api(app)
register_watch(app)


def main() -> None:
    """Entry point."""
    run_app(app, "covey-aggregator", _EXIT_CODES)


@app.command(epilog=examples("init --config aggregator.toml"))
def init(config: Config) -> None:
    """Make the signing key and the database where there are none; print the public key that devices pin."""
    files = AggregatorFiles.load(config)
    key = files.signing_key(create=True)
    files.open_store().close()
    typer.echo(public_key_hex(key.public_key()))


@app.command(epilog=examples("run --config aggregator.toml"))
def run(config: Config) -> None:
    """Run all tasks and take uploads until stopped; one JSON line per event on standard output.

    One process coordinates. A second one, with a client_id and certificate of its own, stands by and takes over.
    """
    _serve(AggregatorFiles.load(config), worker=None)


@app.command(
    epilog=examples(
        "worker --config aggregator.toml --name worker-1",
        "worker --config aggregator.toml --name worker-2 --certificate w2.pem --key w2.key",
    )
)
def worker(
    config: Config,
    name: Annotated[str, typer.Option(help="MQTT client id, unique among the workers; its certificate's name.")],
    certificate: Annotated[
        Path | None, typer.Option(help="Its certificate. Default: NAME.pem beside broker.certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its key. Default: NAME.key beside broker.key.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Loopback port for Prometheus. Default: none.")
    ] = None,
) -> None:
    """Take uploads beside `run`, until stopped: the shards are shared out among all processes that are alive."""
    files = worker_files(
        AggregatorFiles.load(config), name=name, certificate=certificate, key=key, metrics_port=metrics_port
    )
    _serve(files, worker=name)


@app.command(epilog=examples("status --config aggregator.toml", "status --config aggregator.toml --json"))
def status(config: Config, as_json: AsJson = False) -> None:
    """Show all tasks and processes, what was refused, and what does not work as it should."""
    with opened(config) as (files, store):
        found = overview(store, tenant=files.config.aggregator.tenant, now_s=time.time())
    if as_json:
        say_json(found)
    else:
        print_overview(found, plain_console())


def _serve(files: AggregatorFiles, *, worker: str | None) -> None:
    """Run until a signal comes."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))

    hooks = webhooks_of(files) if worker is None else []

    heartbeat = Heartbeat(time.monotonic)

    def should_stop() -> bool:
        heartbeat.beat()
        return bool(stop)

    def run(journal: Journal) -> None:
        service = assemble(files, journal=journal, worker=worker)
        # What is there now stays: left out of every later collection, which took a sixth of this process's time.
        gc.collect()
        gc.freeze()
        with telling(files, hooks, journal=journal):
            service.run(should_stop)

    journal, port = JsonLines(), files.config.aggregator.metrics_port
    if port is None:
        run(journal)
        return
    counting = CountingJournal(journal)
    with ExitStack() as stack:
        if worker is None:
            counting.registry.register(_study_metrics(files, stack))
        probes = Probes(heartbeat.why_not_alive, counting.why_not_ready)
        stack.enter_context(closing(serve_metrics(counting.registry, port, probes=probes)))
        run(counting)


def _study_metrics(files: AggregatorFiles, stack: ExitStack) -> StudyMetrics:
    """What the study as a whole has come to, over connections of its own."""
    store = stack.enter_context(closing(files.open_store()))
    book = AuditBook(
        store.database,
        tenant=files.config.aggregator.tenant,
        aggregator=None,
        helpers={name: one.key for name, one in pinned(files.config.helpers).items()},
        now_s=time.time,
    )
    return StudyMetrics(store, tenant=files.config.aggregator.tenant, audit=book.state)


if __name__ == "__main__":
    main()
