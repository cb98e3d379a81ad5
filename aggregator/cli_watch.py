"""``covey-aggregator watch``: how the study stands, drawn again every second, from its database or over the API."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from aggregator.api_client import ApiClient
from aggregator.cli_options import AsJson, opened
from aggregator.command_line import examples
from aggregator.overview import Overview, overview
from aggregator.overview_screen import screen
from fl_protocol.errors import ConfigError, CoveyError

Look = Callable[[], Overview]
"""Reads how things stand; raises CoveyError."""

_LONGEST_WAIT_S = 5.0
"""For an answer of the API."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog=examples(
            "watch --config aggregator.toml",
            "watch --url https://study.example:8443 --token-file viewer.token --ca keys/ca.pem",
            "watch --config aggregator.toml --once --json",
        )
    )
    def watch(
        *,
        config: Annotated[Path | None, typer.Option(help="Path of aggregator.toml, to read the database.")] = None,
        url: Annotated[str | None, typer.Option(help="Of the HTTP API, to look from elsewhere.")] = None,
        token_file: Annotated[Path | None, typer.Option(help="File with an access token, for --url.")] = None,
        ca: Annotated[Path | None, typer.Option(help="PEM file of the CA of --url. Default: the system's.")] = None,
        every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 1.0,
        once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """Show rounds, processes and troubles as they change, until Ctrl-C; --json prints an object a line."""
        if not (once or as_json or sys.stdout.isatty()):
            raise ConfigError("watch: expected a terminal to draw on; give --json or --once")
        # A terminal is put back by the way out of `Live`, whichever signal asks for it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with _looking(config, url, token_file, ca) as look:
            try:
                _show(look, every_s=every, once=once, as_json=as_json)
            except KeyboardInterrupt:
                return


@contextmanager
def _looking(config: Path | None, url: str | None, token_file: Path | None, ca: Path | None) -> Iterator[Look]:
    """Where to look: the database of a configuration, or an API.

    Raises:
        ConfigError: neither or both are named, or one cannot be used.
        DatabaseError: there is no database, or it fails.
    """
    if (config is None) == (url is None):
        raise ConfigError("watch: expected either --config aggregator.toml or --url with --token-file")
    if config is not None:
        with opened(config) as (files, store):
            yield lambda: overview(store, tenant=files.config.aggregator.tenant, now_s=time.time())
        return
    if token_file is None:
        raise ConfigError(
            "watch: --url needs --token-file, a file with an access token (covey-aggregator token create)"
        )
    try:
        token = token_file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {token_file}: expected a file with an access token ({error})") from error
    with ApiClient(str(url), token, ca=ca, timeout_s=_LONGEST_WAIT_S) as api:
        yield api.overview


def _show(look: Look, *, every_s: float, once: bool, as_json: bool) -> None:
    """Look again and again, or once. Raises CoveyError only when it looks once."""
    if once:
        found = look()
        if as_json:
            _say_line(found)
        else:
            console = Console(highlight=False, emoji=False)
            console.print(screen(found, width=console.width))
    elif as_json:
        for stands, trouble in looks(look, sleep=lambda: time.sleep(every_s)):
            _say_line({"error": trouble} if trouble is not None else stands)
    else:
        console = Console(highlight=False, emoji=False)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for stands, trouble in looks(look, sleep=lambda: time.sleep(every_s)):
                live.update(screen(stands, width=console.width, trouble=trouble), refresh=True)


def looks(look: Look, *, sleep: Callable[[], None]) -> Iterator[tuple[Overview | None, str | None]]:
    """How things stand, again and again: with what was last read, and why nothing newer can be."""
    last = None
    while True:
        trouble = None
        try:
            last = look()
        except CoveyError as error:
            trouble = str(error)
        yield last, trouble
        sleep()


def _say_line(value: object) -> None:
    """One line of JSON, at once: whoever reads a pipe is to see it now."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
