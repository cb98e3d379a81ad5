"""Whatever lists or shows something prints JSON too, for scripts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import click
import pytest
from typer.main import get_command

from device_client.cli import _parser

SHOWS = {
    "list",
    "show",
    "status",
    "spent",
    "plan",
    "audit",
    "scenarios",
    "profiles",
    "watch",
    "check",
    "ledger",
    "sent",
}
"""Last words of commands that tell something."""
TYPER = {
    "covey-aggregator": "aggregator.cli",
    "covey-helper": "aggregator.helper.cli",
    "covey-fleet": "firmware_sim.cli",
}


def commands(command: click.Command, path: str) -> Iterator[tuple[str, set[str]]]:
    """Every command and its options."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, {option for parameter in command.params for option in parameter.opts}
        return
    for name, one in below.items():
        yield from commands(one, f"{path} {name}")


def telling(found: dict[str, set[str]]) -> dict[str, set[str]]:
    return {path: options for path, options in found.items() if path.split()[-1] in SHOWS}


@pytest.mark.parametrize("name", TYPER)
def test_what_a_typer_command_shows_can_be_had_as_json(name: str) -> None:
    found = telling(dict(commands(get_command(importlib.import_module(TYPER[name]).app), name)))
    assert len(found) >= 2
    assert [path for path, options in found.items() if "--json" not in options] == []


def test_what_a_device_shows_can_be_had_as_json() -> None:
    (groups,) = [one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction)]
    found = {
        name: {option for action in sub._actions for option in action.option_strings}
        for name, sub in groups.choices.items()
        if name in SHOWS
        or any("list" in (action.choices or ()) for action in sub._actions if not action.option_strings)
    }
    assert {"status", "ledger", "sent", "consent", "pseudonyms"} <= set(found)
    assert [name for name, options in found.items() if "--json" not in options] == []
