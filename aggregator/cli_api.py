"""``covey-aggregator api``: serves the HTTP API as a process of its own."""

from __future__ import annotations

import typer

from aggregator.cli_options import Config, opened
from aggregator.command_line import examples
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.errors import ConfigError
from fl_protocol.helper_config import pinned


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=examples("api --config aggregator.toml"))
    def api(config: Config) -> None:
        """Serve the HTTP API until stopped, as the section [api] says; one JSON line per event on standard output.

        With `dashboard = true` the pages for browsers as well, at /dashboard (docs/operations.md).

        It needs the database and nothing else: no broker, no signing key. Any number of them may run.
        """
        try:
            from aggregator.api.serving import serve  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            raise ConfigError(f"the HTTP API needs pip install 'covey[api]' ({error})") from error
        with opened(config) as (files, store):
            section = files.config.api
            if section is None:
                raise ConfigError(f"configuration {config}: expected a section [api]; see docs/operations.md")
            helpers = {name: one.key for name, one in pinned(files.config.helpers).items()}
            tenant = files.config.aggregator.tenant
            serve(store, section, tenant=tenant, config=config, journal=JsonLines(), helpers=helpers)
