"""``covey-aggregator watch``: what it shows, that it survives a database that is away, and how it ends."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from aggregator.cli_watch import looks
from aggregator.errors import DatabaseError
from aggregator.overview import Overview, TaskOverview, WorkerOverview
from aggregator.overview_screen import screen
from aggregator.store.presence import FleetCounts
from tests.aggregator.api.seeded_study import SeededStudy
from tests.aggregator.api.served import Desk, served
from tests.aggregator.operator_desk import Operator, one_sentence, operator

__all__ = ["operator"]
ENOUGH_S = 30.0
TASK = TaskOverview(
    name="exercises", kind="train", phase="open", round=7, committed=6, rounds=60, arrived=5, goal=16,
    deadline_s=1090.0, version=6, probability=0.25, pausing=False, failures=0, reason="", created_s=1.0,
)  # fmt: skip
WORKER = WorkerOverview(
    name="aggregator", state="alive", coordinates=True, shards=64, started_s=1.0, seen_s=999.0, detail="connected"
)
FLEET = FleetCounts(
    active=20, quarantined=1, revoked=2, online=12, offline=5, unheard=3, reasons={"battery": 0, "charger": 7}
)
STUDY = Overview(
    tenant="clinic", at_s=1000.0, tasks=[TASK], workers=[WORKER], devices=20, fleet=FLEET, refused={"not_finite": 3},
    degraded=[],
)  # fmt: skip


def drawn(found: Overview | None, width: int, trouble: str | None = None) -> list[str]:
    """Lines of the screen at this width."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(screen(found, width=width, trouble=trouble))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [50, 60, 89, 90, 120, 200])
def test_the_open_round_is_seen_whole_at_every_width(width: int) -> None:
    lines = drawn(STUDY, width)
    assert max(map(len, lines)) <= width
    text = "".join(" ".join(lines).split())
    for part in (
        "exercises",
        "5of16",
        "in90s",
        "coordinates",
        "20active",
        "7forcharger",
        "refused:notfinite:3",
        "nothingisdegraded",
    ):
        assert part in text, (part, lines)


def test_a_round_fills_its_bar() -> None:
    def filled(arrived: int) -> int:
        study = msgspec.structs.replace(STUDY, tasks=[msgspec.structs.replace(TASK, arrived=arrived)])
        console = Console(width=160, force_terminal=True, color_system="standard", no_color=False)
        with console.capture() as capture:
            console.print(screen(study, width=160))
        return capture.get().count("━")

    assert filled(16) == filled(40) > 0


def test_names_and_reasons_are_not_taken_for_markup() -> None:
    odd = msgspec.structs.replace(TASK, reason="[bold]no[/bold] [/nothing]", phase="paused")
    study = msgspec.structs.replace(STUDY, tasks=[odd], degraded=["[red]x"])
    text = "\n".join(drawn(study, 200))
    assert "[bold]no[/bold] [/nothing]" in text
    assert "degraded: [red]x" in text
    assert "nothing is degraded" not in text


def test_before_anything_is_there_it_says_what_to_start() -> None:
    text = "\n".join(drawn(msgspec.structs.replace(STUDY, tasks=[], workers=[]), 200))
    assert "task create" in text
    assert "covey-aggregator run" in text
    assert "nothing was read yet" in "\n".join(drawn(None, 80, "the database cannot be read"))


def test_what_was_last_read_stays_while_nothing_can_be_read() -> None:
    answers: Iterator[Overview | None] = iter([STUDY, None, msgspec.structs.replace(STUDY, devices=21)])

    def look() -> Overview:
        found = next(answers)
        if found is None:
            raise DatabaseError("the database cannot be read: disk I/O error")
        return found

    first, second, third = islice(looks(look, sleep=lambda: None), 3)
    assert first == (STUDY, None)
    assert second == (STUDY, "the database cannot be read: disk I/O error")
    assert third[1] is None
    text = "\n".join(drawn(second[0], 80, second[1]))
    assert "cannot be read: the database cannot be read: disk I/O error" in text
    assert "as it stood at" in text
    assert "as it stands at" in "\n".join(drawn(STUDY, 80))


def test_once_as_json_is_what_status_says(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    (line,) = operator.says("watch", "CONFIG", "--once", "--json").splitlines()
    watched, status = msgspec.json.decode(line), operator.json("status", "CONFIG")
    assert watched["tasks"] == status["tasks"]
    assert watched["tasks"][0]["name"] == "watch"
    assert "watch" in operator.says("watch", "CONFIG", "--once")


def test_over_the_api_it_is_the_same(operator: Operator, tmp_path: Path) -> None:
    study = SeededStudy(f"sqlite:///{tmp_path / 'study.db'}")
    with closing(study.store), served(Desk(study)) as server:
        token = operator.write("viewer.token", study.tokens["viewer"] + "\n")
        url = f"http://127.0.0.1:{server.port}"
        (line,) = operator.says("watch", "--url", url, "--token-file", str(token), "--once", "--json").splitlines()
        found = msgspec.json.decode(line, type=Overview)
        assert found.tenant == "clinic"
        assert found.tasks
        token.write_text("covey_not_one")
        refused = operator.run("watch", "--url", url, "--token-file", str(token), "--once")
    one_sentence(refused, 1, "401")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--once"], "--token-file"),
        (["CONFIG", "--url", "http://127.0.0.1:1", "--once"], "either"),
        (["--url", "http://127.0.0.1:1", "--once"], "--token-file"),
        (["--url", "http://127.0.0.1:1", "--token-file", "./none", "--once"], "access token"),
        (["--url", "http://study.example", "--token-file", "./watch.toml", "--once"], "https://"),
        (["CONFIG"], "terminal"),
    ],
)
def test_what_it_cannot_look_at_is_one_sentence(operator: Operator, arguments: list[str], word: str) -> None:
    operator.says("init", "CONFIG")
    one_sentence(operator.run("watch", *arguments), 2, word)


@contextmanager
def in_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of its own, and that terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aggregator.cli", "watch", *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What the terminal got, up to and with this."""
    got, deadline = b"", time.monotonic() + ENOUGH_S
    while wanted not in got:
        assert time.monotonic() < deadline, got[-2000:]
        if select.select([terminal], [], [], 1.0)[0]:
            got += os.read(terminal, 65536)
    return got


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_terminal_it_follows_and_puts_the_terminal_back(operator: Operator, number: signal.Signals) -> None:
    operator.says("init", "CONFIG")
    with in_a_terminal("--config", str(operator.config), "--every", "0.2") as (process, terminal):
        assert b"\x1b[?1049h" in read_until(terminal, b"no task yet")
        operator.says("task", "create", "./watch.toml", "CONFIG")
        read_until(terminal, b"watch")
        process.send_signal(number)
        read_until(terminal, b"\x1b[?1049l")
        assert process.wait(ENOUGH_S) == 0
