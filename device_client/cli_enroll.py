"""``covey-device enroll``: joins a study with a token, over the wire, and writes it into ``device.toml``.

Killed at any moment it is run again: the same request is sent, and what was granted is finished without asking.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path

from device_client.adapters.system_entropy import system_entropy
from device_client.adapters.system_time import SystemBell, SystemClock
from device_client.assembly import DeviceFiles, NoJournal
from device_client.cli_ask import is_running
from device_client.config import StudyConfig
from device_client.errors import DeviceError
from device_client.events import Tick
from device_client.joining.checks import check_before_asking, clock_words
from device_client.joining.joiner import Joiner
from device_client.joining.records import JoiningState
from device_client.joining.renewal import new_client, renewed_from_s
from device_client.joining.session import Offline, Online
from device_client.joining.study_section import check_claimed, check_pins, joined_study, section_text, with_section
from device_client.joining.words import refusal_words
from device_client.pseudonyms import Pseudonyms, date_text
from fl_protocol.adapters.config_files import pinned_publishers, read_file, relative_to_config
from fl_protocol.adapters.files import write_atomic
from fl_protocol.bundle import open_bundle
from fl_protocol.enrolment import MAX_PSEUDONYMS
from fl_protocol.errors import ConfigError
from fl_protocol.joining import Claim, Token, decode_claim, parse_token, token_digest
from fl_protocol.terminal import visible
from fl_protocol.transport import Connected, Disconnected, Received, Transport

EPILOG = """examples:
  covey-device enroll --config device.toml --claim claim.json --token covey1-... --bundle watch.covey
  covey-device enroll --config device.toml --claim claim.json --token - --bundle watch.covey < token.txt
  covey-device enroll --config device.toml --claim claim.json --token covey1-...     a study that is in device.toml

The token comes from the study's operator over a way that you trust; claim.json may come over any. With --token - it is
read from standard input, and is in no list of processes. Afterwards: covey-device consent grant.
"""
_TURN_S = 0.5
_LONGEST_TOKEN = 1024


def enroll(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Join a study."""
    if not 1 <= arguments.count <= MAX_PSEUDONYMS:
        raise ConfigError(f"--count {arguments.count}: expected 1 to {MAX_PSEUDONYMS}")
    claim = decode_claim(read_file(arguments.claim, "--claim"))
    token = parse_token(sys.stdin.read(_LONGEST_TOKEN) if arguments.token == "-" else arguments.token)  # noqa: S105
    check_before_asking(claim, token, now_s=time.time())
    study = f"{claim.tenant}/{claim.task}"
    there = next((one for one in files.config.studies if one.study == study), None)
    if there is not None:
        check_claimed(there, claim)
    elif arguments.bundle is None:
        raise ConfigError(f"{study} is not in {files.path} yet: expected --bundle FILE, the study's model")
    else:
        read_file(arguments.bundle, "--bundle")
    if is_running(files):
        raise ConfigError("the daemon is running and has the store open: stop it, then run this again")
    files.tls_keys.check()
    with closing(files.open_store()) as store:
        names = Pseudonyms(store, tenant=claim.tenant, task=claim.task, tls_keys=files.tls_keys)
        joiner = Joiner(
            store,
            names,
            study=study,
            entropy=system_entropy,
            jitter=os.urandom,
            clock=SystemClock(),
            journal=NoJournal(),
            count=arguments.count,
        )
        if _is_new(joiner.state, token):
            joiner.open_claim(claim, token, anew=arguments.anew)
            _ask(files, joiner, claim, within_s=arguments.wait)
        return _finish(files, joiner, there, arguments.bundle)


def _is_new(state: JoiningState | None, token: Token) -> bool:
    """Whether this token was not used by this very device."""
    return state is None or state.membership is None or state.membership.token != token_digest(token.secret)


def _ask(files: DeviceFiles, joiner: Joiner, claim: Claim, *, within_s: float) -> None:
    """Ask until something comes of it. Raises DeviceError: a refusal, or no answer in time."""
    request, bell = joiner.state.request if joiner.state is not None else None, SystemBell()
    client = request.client if request is not None and request.client.startswith("c") else new_client(os.urandom)
    way, ends_s = files.connect_to_desk(claim, client, wake=bell.ring), time.monotonic() + within_s
    line = _Progress()
    line.say(f"{joiner.study}: asking at {claim.broker.host}:{claim.broker.port}")
    way.open()
    try:
        while joiner.is_asking and time.monotonic() < ends_s:
            _take(way, joiner, client, line)
            joiner.tell(Tick(), way)
            bell.wait(_TURN_S)
    finally:
        way.close()
    state = joiner.state
    if state is not None and state.refusal is not None:
        raise DeviceError(refusal_words(joiner.study, state.refusal))
    if joiner.is_asking:
        dropped = joiner.session.dropped if joiner.session is not None else ""
        heard = f"; what came in its place was dropped: {dropped}" if dropped else ""
        raise DeviceError(
            f"{joiner.study}: no answer within {within_s:g} s ({line.said[-1]}{heard}); run this again, and the same "
            "request is sent"
        )


def _take(way: Transport, joiner: Joiner, client: str, line: _Progress) -> None:
    """What has come from the broker."""
    while (event := way.poll(0.0)) is not None:
        match event:
            case Connected():
                line.is_up = True
                line.say("connected; waiting for the answer")
                joiner.tell(Online(client), way)
            case Disconnected():
                line.is_up = False
                line.say(f"not connected: {event.reason}")
                joiner.tell(Offline(), way)
            case Received():
                joiner.tell(event, way)
    state, now_s = joiner.state, time.time()
    if joiner.is_asking and state is not None and joiner.session is not None and joiner.session.is_told_to_wait(now_s):
        line.say(f"many devices are asking: this one's turn is in about {state.wait_s:.0f} s")
    if joiner.is_asking and not joiner.client and line.is_up:
        joiner.tell(Online(client), way)  # the disk had refused, and the session began again


class _Progress:
    """What happens, a line each, on standard error; nothing twice in a row."""

    def __init__(self) -> None:
        self.said: list[str] = [""]
        self.is_up = False

    def say(self, text: str) -> None:
        """Say it."""
        if text != self.said[-1]:
            self.said.append(text)
            print(visible(text), file=sys.stderr, flush=True)


def _finish(files: DeviceFiles, joiner: Joiner, there: StudyConfig | None, bundle: Path | None) -> int:
    """Show what was granted, and configure the study."""
    state = joiner.state
    if state is None or state.membership is None:
        raise DeviceError(f"{joiner.study}: expected an enrolment")
    pins = state.membership.pins
    joined = joined_study(state.claim, pins, bundle=_path_text(files, bundle) if bundle is not None else "")
    periods = [one.period for one in joiner.names.installed()]
    until = f"{len(periods)} names until {date_text(periods[-1].ends_s)}, renewed by the daemon from "
    print(f"{joiner.study}: enrolled as {state.membership.enrolment}; {until}{date_text(renewed_from_s(joiner))} on")
    print(f"  aggregator_key {joined.aggregator_key} (the token vouches for it)")
    if joined.publisher_key is not None:
        print(f"  publisher_key  {joined.publisher_key}")
    else:
        print(f"  publishers, {joined.publisher_threshold} of whom must have signed a model:")
        print("\n".join(f"    {key}" for key in joined.publishers))
    for one in joined.helpers:
        print(visible(f"  helper {one.name}, run by {one.operator}: {one.key}"))
    if joined.helpers:
        print("compare the helpers' keys with what the helpers themselves publish: the operator named them to you")
    if there is not None:
        check_pins(there, joined)
    else:
        _configure(files, joined)
    if state.refusal is not None:
        print(visible(f"renewal was refused: {refusal_words(joiner.study, state.refusal)}"))
    clock = clock_words(periods, time.time())
    if clock is not None:
        print(f"{joiner.study}: {clock[1]} ({clock[0]})")
    print(f"next: covey-device consent --config {files.path} grant {joined.task}")
    return 0


def _configure(files: DeviceFiles, joined: StudyConfig) -> None:
    """Add the study to the configuration. Raises ConfigError, BundleError."""
    publishers = pinned_publishers(files.path, joined.publisher_pins, section="study")
    open_bundle(read_file(relative_to_config(files.path, joined.bundle), "--bundle"), publisher=publishers)
    path = files.path.resolve()  # not a link to it
    try:
        before, mode = path.read_bytes(), path.stat().st_mode & 0o777
        write_atomic(path, with_section(before, joined), mode=mode)
    except OSError as error:
        raise ConfigError(
            f"{files.path} cannot be written ({error.strerror}); as somebody who may, add this at its end:\n\n"
            f"{section_text(joined)}"
        ) from error
    print(f"{files.path}: the study was added at its end")


def _path_text(files: DeviceFiles, bundle: Path) -> str:
    """A bundle's path as it stands in the configuration: relative where it is beside or below that."""
    whole, folder = bundle.resolve(), files.path.parent.resolve()
    return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)
