"""From a configuration file to an aggregator: opens the database, verifies the bundle, connects the parts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.config import AggregatorConfig
from aggregator.daemon import AggregatorDaemon
from aggregator.store import AggregatorStore
from fl_protocol.adapters.config_files import load_toml, pinned_key, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import ConfigError

_KEY_BYTES = 32


@dataclass(frozen=True)
class AggregatorFiles:
    """A configuration file and what it names."""

    path: Path
    config: AggregatorConfig

    @classmethod
    def load(cls, path: Path) -> AggregatorFiles:
        """Read and check an ``aggregator.toml``. Raises ConfigError."""
        config = load_toml(path, AggregatorConfig)
        try:
            config.task.plan.message()
        except msgspec.ValidationError as error:
            raise ConfigError(f"configuration {path}: task.plan: {error}") from error
        if config.task.minimum_cohort > config.task.goal:
            raise ConfigError(f"configuration {path}: task.minimum_cohort is above task.goal")
        return cls(path, config)

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

    def open_bundle(self) -> ModelBundle:
        """The task's verified bundle. Raises ConfigError or BundleError."""
        task = self.config.task
        data = read_file(relative_to_config(self.path, task.bundle), "task.bundle")
        return open_bundle(data, publisher=pinned_key(self.path, "task.publisher_key", task.publisher_key))

    def open_store(self) -> AggregatorStore:
        """The database, with the task in it. Raises DatabaseError."""
        database = self.config.aggregator.database
        url = database if "://" in database else f"sqlite:///{relative_to_config(self.path, database)}"
        return AggregatorStore(url, self.config.task.name)


def assemble(files: AggregatorFiles, *, journal: Journal) -> AggregatorDaemon:
    """A daemon on the real adapters, ready to run.

    Raises:
        CoveyError: one sentence about what is missing or wrong.
    """
    config = files.config
    bundle, store = files.open_bundle(), files.open_store()
    store.create_task(bundle.graph_digest, bundle.shared_params)
    return AggregatorDaemon(
        tenant=config.aggregator.tenant,
        task=config.task,
        graph_digest=bundle.graph_digest,
        signing_key=files.signing_key(),
        store=store,
        transport=make_transport(config.broker, config=files.path, client_id=config.aggregator.client_id),
        journal=journal,
        entropy=os.urandom,
        now_s=time.time,
    )
