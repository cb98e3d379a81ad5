"""From a configuration file to an aggregator: opens the database and its blobs, connects the parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import make_url

from aggregator.adapters.commit_process import Commit, CommitProcess
from aggregator.adapters.freed_memory import keep_freed_memory
from aggregator.adapters.graph_judge import GraphJudge
from aggregator.adapters.https_helper import HttpsHelper
from aggregator.adapters.https_link import HttpsLink
from aggregator.adapters.open_blobs import open_blobs
from aggregator.alerts.alarms import Alarms
from aggregator.announcer import Announcer
from aggregator.answers import Answers
from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import origin_of
from aggregator.batches import Commits, CommitsHere
from aggregator.committer import Committer, PendingUpdate, Verdict
from aggregator.config import AggregatorConfig
from aggregator.coordinator import Coordinator, Pace
from aggregator.cosigning import Cosigning
from aggregator.errors import DatabaseError
from aggregator.fleet_watch import FleetWatch
from aggregator.helper_calls import HelperCalls, HelperLink
from aggregator.in_force import config_of, tasks_in_force
from aggregator.ingest import OPENER, Opener
from aggregator.intake import Intake, IntakeLimits
from aggregator.revocation_notices import RevocationNotices
from aggregator.service import AggregatorService
from aggregator.shards import LeaseTerms
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database, Older
from aggregator.store.tasks import StoredTask
from aggregator.task_file import TaskConfig
from aggregator.task_runner import RunnerPorts, TaskRunner
from aggregator.validation import load_validation
from aggregator.worker import IngestWorker
from fl_protocol.adapters.config_files import load_toml, pinned_publishers, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.helper_config import pinned
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.transport import Transport

_KEY_BYTES = 32
QUEUED_BYTES = 8 * 2**20
"""What has come and is not looked at yet; while it is full, the broker keeps the rest."""
SESSION_EXPIRY_S = 3600
"""How long the broker keeps what came for a worker that is away."""


@dataclass(frozen=True)
class AggregatorFiles:
    """A configuration file and what it names."""

    path: Path
    config: AggregatorConfig

    @classmethod
    def load(cls, path: Path) -> AggregatorFiles:
        """Read and check an ``aggregator.toml``. Raises ConfigError."""
        return cls(path, load_toml(path, AggregatorConfig))

    def signing_key(self, *, create: bool = False) -> Ed25519PrivateKey:
        """The aggregator's key; with `create`, made where there is none.

        Raises:
            ConfigError: it is missing, of the wrong size, or readable by others.
        """
        path = relative_to_config(self.path, self.config.aggregator.signing_key)
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, os.urandom(_KEY_BYTES))
        raw = read_file(path, "aggregator.signing_key")
        # Security: whoever reads this key can sign models that every device accepts.
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"the signing key {path} can be read by others; run chmod 600 on it")
        if len(raw) != _KEY_BYTES:
            raise ConfigError(f"the signing key {path}: expected {_KEY_BYTES} bytes, got {len(raw)}")
        return Ed25519PrivateKey.from_private_bytes(raw)

    def helper_links(self) -> dict[str, HelperLink]:
        """Links to the helpers that are asked over HTTPS, working. Raises ConfigError."""
        links: dict[str, HelperLink] = {}
        for one in self.config.helpers:
            if one.url is None:
                continue
            names = one.ca or "", one.certificate or "", one.certificate_key or ""
            ca, certificate, key = (relative_to_config(self.path, name) for name in names)
            host, _, port = one.url.removeprefix("https://").partition(":")
            try:
                helper = HttpsHelper(host, int(port), ca=ca, certificate=certificate, key=key)
            except LocalMisuseError as error:
                raise ConfigError(f"configuration {self.path}: helper {one.name}: {error}") from error
            links[one.name] = HttpsLink(helper, self.config.aggregator.tenant).start()
        return links

    def open_store(self, *, create: bool = True, older: Older = "refuse") -> AggregatorStore:
        """The database and its blobs.

        Args:
            create: whether to make an SQLite file where there is none.
            older: what is done with a database of an earlier version. Commands and services refuse it: another process
                may be at work on it, and there is no way back without a backup.

        Raises:
            ConfigError: the configuration does not say where they are.
            DatabaseError: there is none, it fails, or it is refused.
        """
        section = self.config.aggregator
        url, blobs = section.database, section.blobs
        if "://" not in url:
            path = relative_to_config(self.path, url)
            # A mistyped path must not look like a service without tasks.
            if not create and not path.exists():
                raise DatabaseError(
                    f"there is no database {path}; make it with covey-aggregator init, or correct aggregator.database"
                )
            url = f"sqlite:///{path}"
        if blobs is None:
            parsed = make_url(url)
            if not parsed.drivername.startswith("sqlite") or not parsed.database:
                raise ConfigError(
                    f"configuration {self.path}: aggregator.blobs: a database that is no file needs to be told where "
                    "large values go: a folder that all workers share, or an URL such as s3://bucket/prefix"
                )
            blobs = f"{parsed.database}.blobs"
        elif "://" not in blobs:
            blobs = str(relative_to_config(self.path, blobs))
        store = open_blobs(blobs)
        return AggregatorStore(Database(url, blobs=store, older=older), store)


def bundle_of(store: AggregatorStore, task: StoredTask) -> ModelBundle:
    """A task's bundle, as it was when the task was created. Raises BundleError or DatabaseError."""
    return open_task_bundle(store.blobs, task.bundle, config_of(task.spec, task.name))


def open_task_bundle(blobs: Blobs, name: str, config: TaskConfig) -> ModelBundle:
    """A task's bundle, by the name of the large value. Raises BundleError or DatabaseError."""
    publishers = pinned_publishers(f"of {config.name} in the database", config.publisher_pins)
    return open_bundle(blobs.get(name), publisher=publishers)


def assemble(files: AggregatorFiles, *, journal: Journal, worker: str | None = None) -> AggregatorService:
    """An aggregator ready to run, or one of its ingest workers.

    Args:
        files: its configuration.
        journal: where its events go.
        worker: MQTT client id of a process that only takes uploads; None for one that also coordinates.

    Raises:
        ConfigError, DatabaseError: something is missing or does not fit.
    """
    keep_freed_memory()
    section = files.config.aggregator
    transport = make_transport(
        files.config.broker,
        config=files.path,
        client_id=worker or section.client_id,
        manual_acknowledgement=True,
        session_expiry_s=SESSION_EXPIRY_S,
        maximum_inflight=200,
        most_queued_bytes=QUEUED_BYTES,
        room_wait_s=0.5,
    )
    return make_service(
        tenant=section.tenant,
        name=worker or section.client_id,
        coordinates=worker is None,
        signing_key=files.signing_key(),
        store=files.open_store(create=False),
        transport=transport,
        journal=journal,
        entropy=os.urandom,
        now_s=time.time,
        monotonic_s=time.monotonic,
        limits=IntakeLimits(section.reassembly_bytes, section.device_bytes_a_minute, section.device_transfers_a_minute),
        helpers=pinned(files.config.helpers),
        links=files.helper_links() if worker is None else None,
        commits=CommitProcess(partial(_commits, files.path, worker or section.client_id)),
        watches_fleet=True,
    )


def make_service(
    *,
    tenant: str,
    name: str,
    coordinates: bool,
    signing_key: Ed25519PrivateKey,
    store: AggregatorStore,
    transport: Transport,
    journal: Journal,
    entropy: Callable[[int], bytes],
    now_s: Callable[[], float],
    monotonic_s: Callable[[], float],
    limits: IntakeLimits,
    helpers: Mapping[str, HelperIdentity] | None = None,
    links: Mapping[str, HelperLink] | None = None,
    commits: Commits | None = None,
    leases: LeaseTerms = LeaseTerms(),  # noqa: B008 - frozen
    pace: Pace = Pace(),  # noqa: B008 - frozen
    watches_fleet: bool = False,
    opener: Opener = OPENER,
) -> AggregatorService:
    """The parts of one process, connected; a simulation passes its own transport, time and randomness.

    Args:
        tenant: name on the wire.
        name: of this process, unique among those that share the database.
        coordinates: whether it runs rounds, or only takes uploads.
        signing_key: signs manifests, model chunks, receipts and NACKs.
        store: the database.
        transport: the broker connection.
        journal: where events are told.
        entropy: cryptographic source of bytes.
        now_s: Unix seconds.
        monotonic_s: seconds that no clock setting moves.
        limits: what half-received updates and single devices may take.
        helpers: of secure rounds, by name.
        links: to those that are not asked over the broker.
        commits: whole updates; None to do so in this process.
        opener: verifies headers and opens seals in this process.
        leases: how long they are taken for.
        watches_fleet: whether devices' presence is listened to.
        pace: how often orders, new tasks and what can be tidied are looked for.
    """
    committer = Committer(tenant=tenant, worker=name, store=store, entropy=entropy, now_s=now_s, opener=opener)
    commits = commits or CommitsHere(lambda batch: committer.commit(batch, lambda: tasks_in_force(store)))
    intake = Intake(
        tenant=tenant,
        store=store,
        committer=committer,
        answers=Answers(tenant, signing_key, transport),
        transport=transport,
        journal=journal,
        now_s=now_s,
        limits=limits,
        commits=commits,
    )
    worker = IngestWorker(
        name=name,
        tenant=tenant,
        store=store,
        intake=intake,
        committer=committer,
        transport=transport,
        journal=journal,
        now_s=now_s,
        terms=leases,
    )
    coordinator = None
    if coordinates:
        announcer = Announcer(tenant, signing_key, transport)
        calls = HelperCalls(
            tenant=tenant,
            helpers=helpers or {},
            signing_key=signing_key,
            transport=transport,
            note=partial(_noted, journal, now_s),
            now_s=now_s,
            links=links,
        )
        cosigning = Cosigning(
            tenant=tenant,
            checkpoints=Checkpoints(store.database, origin_of(tenant)),
            signing_key=signing_key,
            helpers=helpers or {},
            line=calls,
            note=partial(_noted, journal, now_s),
            now_s=now_s,
        )
        notices = RevocationNotices(
            tenant=tenant,
            database=store.database,
            signing_key=signing_key,
            helpers=helpers or {},
            line=calls,
            note=partial(_noted, journal, now_s),
            now_s=now_s,
        )
        calls.listen(cosigning.hear)
        calls.listen(notices.hear)
        fleet = FleetWatch(tenant=tenant, store=store, transport=transport, now_s=now_s) if watches_fleet else None
        ports = RunnerPorts(tenant, store, announcer, journal, entropy, now_s, name, calls)
        coordinator = Coordinator(
            name=name,
            ports=ports,
            load=lambda task: _load(task, ports),
            monotonic_s=monotonic_s,
            terms=leases,
            pace=pace,
            cosigning=cosigning,
            notices=notices,
            fleet=fleet,
            alarms=Alarms(store, now_s=now_s),
        )
    return AggregatorService(
        transport=transport,
        store=store,
        worker=worker,
        coordinator=coordinator,
        journal=journal,
        now_s=now_s,
        commits=commits,
    )


def _commits(config: Path, name: str) -> Commit:
    """What commits, in a process of its own."""
    files = AggregatorFiles.load(config)
    store = files.open_store(create=False)
    tenant = files.config.aggregator.tenant
    committer = Committer(tenant=tenant, worker=name, store=store, entropy=os.urandom, now_s=time.time)

    def commit(batch: Sequence[PendingUpdate]) -> list[Verdict]:
        verdicts = committer.commit(batch, lambda: tasks_in_force(store))
        committer.keep_only({(one.task, one.number) for one in store.rounds.live()})
        return verdicts

    return commit


def _noted(journal: Journal, now_s: Callable[[], float], event: str, **fields: object) -> None:
    """Write to the journal."""
    journal.write(event, at_s=now_s(), **fields)


def _load(task: StoredTask, ports: RunnerPorts) -> TaskRunner:
    """A task ready to run, from what the database has of it."""
    bundle, judge = bundle_of(ports.store, task), None
    if task.validation is not None:
        judge = GraphJudge(bundle, load_validation(ports.store.blobs.get(task.validation), bundle.manifest))
    return TaskRunner(task, bundle=bundle, judge=judge, ports=ports)
