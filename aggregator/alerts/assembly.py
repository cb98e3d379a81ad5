"""Webhooks as configured, and the thread of a coordinator's process that tells them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aggregator.adapters.webhook_post import WebhookPost
from aggregator.alerts.signature import secret_bytes
from aggregator.alerts.webhooks import Webhook, Webhooks
from aggregator.assembly import AggregatorFiles
from aggregator.errors import AggregatorError, DatabaseError
from aggregator.overview import coordinator_of
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.adapters.config_files import read_file, relative_to_config
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ConfigError

LOOK_EVERY_S = 1.0
_ENDS_WITHIN_S = 5.0


def webhooks_of(files: AggregatorFiles) -> list[Webhook]:
    """The configured webhooks.

    Raises:
        ConfigError: a file or a URL cannot be used.
    """
    found = []
    for section in files.config.webhook:
        path = relative_to_config(files.path, section.secret)
        text = read_file(path, f"the secret of webhook {section.name}").decode("ascii", errors="replace")
        # Security: whoever has it can tell the receiver anything.
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"the secret {path} can be read by others; run chmod 600 on it")
        try:
            key = secret_bytes(text)
        except AggregatorError as error:
            raise ConfigError(f"the secret {path} of webhook {section.name}: {error}") from error
        ca = None if section.ca is None else relative_to_config(files.path, section.ca)
        post = WebhookPost(section.url, ca=ca, timeout_s=section.timeout_s)
        found.append(Webhook(section.name, frozenset(section.events), key, post))
    return found


@contextmanager
def telling(files: AggregatorFiles, hooks: Sequence[Webhook], *, journal: Journal) -> Iterator[None]:
    """Tell webhooks from a thread of its own while inside, and while this process coordinates.

    A receiver that takes its time keeps no round waiting.
    """
    if not hooks:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_tell, args=(files, hooks, journal, stop), name="webhooks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_ENDS_WITHIN_S)


def _tell(files: AggregatorFiles, hooks: Sequence[Webhook], journal: Journal, stop: threading.Event) -> None:
    """The thread. While the database is away it waits; the coordinator says that it is."""

    def note(event: str, /, **fields: Any) -> None:
        journal.write(event, at_s=time.time(), **fields)

    section, store, more, begun = files.config.aggregator, None, False, False
    while not stop.wait(0.0 if more else LOOK_EVERY_S):
        try:
            store = store or files.open_store(create=False)
            teller = Webhooks(store.database, tenant=section.tenant, hooks=hooks, note=note, now_s=time.time)
            if not _leads(store, section.client_id):
                more = begun = False
                continue
            if not begun:
                teller.begin()
                begun = True
            more = teller.step()
        except DatabaseError:
            more = False
    if store is not None:
        store.close()


def _leads(store: AggregatorStore, name: str) -> bool:
    """Whether this process coordinates: of several, one tells."""
    return coordinator_of(store.leases.all(), now_s=time.time()) == name
