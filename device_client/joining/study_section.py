"""The ``[[study]]`` section of a study that was joined: as text for ``device.toml``, or held against the one there.

Pure: the file's bytes in and out.
"""

from __future__ import annotations

import json

import msgspec

from device_client.config import DeviceConfig, StudyConfig
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError
from fl_protocol.joining import Claim, StudyPins

_MOST = 1200
"""Characters of a pin that an error repeats: sixteen keys."""


def joined_study(claim: Claim, pins: StudyPins, *, bundle: str) -> StudyConfig:
    """What a study that was joined is configured as.

    Args:
        claim: that the token vouched for.
        pins: that came with the grant.
        bundle: path of the model, relative to the configuration.
    """
    publishers = pins.publisher_pins
    is_one = len(publishers.keys) == 1
    return StudyConfig(
        tenant=claim.tenant,
        task=claim.task,
        broker=BrokerConfig(host=pins.broker.host, port=pins.broker.port),
        bundle=bundle,
        publisher_key=publishers.keys[0] if is_one else None,
        aggregator_key=claim.aggregator_key,
        publishers=() if is_one else publishers.keys,
        publisher_threshold=None if is_one else publishers.threshold,
        helpers=pins.helpers,
    )


def check_claimed(there: StudyConfig, claim: Claim) -> None:
    """Whether a configured study is the claim's, as far as that is known before anything is asked.

    Raises:
        ConfigError: it goes by a fixed name, or pins another aggregator.
    """
    if there.id is not None:
        raise ConfigError(
            f"{there.study} goes by the fixed name {there.id} in this configuration; take its line id away, so that it "
            "can go by names that change"
        )
    _check_key(there.study, "aggregator_key", there.aggregator_key, claim.aggregator_key)


def check_pins(there: StudyConfig, joined: StudyConfig) -> None:
    """Whether what is pinned in the configuration is what the study says.

    Args:
        there: in the configuration.
        joined: as `joined_study` makes it.

    Raises:
        ConfigError: it is not; the text names the key.
    """
    _check_key(there.study, "aggregator_key", there.aggregator_key, joined.aggregator_key)
    # Security: also a threshold that was lowered, or one more key, would let in models that these pins keep out.
    one = len(there.publisher_pins.keys) == len(joined.publisher_pins.keys) == 1
    name = "publisher_key" if one else "publishers and publisher_threshold"
    _check_key(there.study, name, there.publisher_pins.words, joined.publisher_pins.words)
    here, said = ({one.name: one for one in study.helpers} for study in (there, joined))
    for name in sorted(here.keys() | said.keys()):
        if name not in here or name not in said:
            where, other = ("the study's answer", "this configuration")[:: 1 if name in said else -1]
            raise ConfigError(
                f"{there.study}: helpers: {name} is in {where} and not in {other}; ask the helper itself, mend the "
                "configuration, then run this again"
            )
        _check_key(there.study, f"helpers: the key of {name}", here[name].key, said[name].key)
        _check_key(there.study, f"helpers: the operator of {name}", here[name].operator, said[name].operator)


def section_text(study: StudyConfig) -> str:
    """A study as a section of ``device.toml``."""
    lines = ["[[study]]"]
    lines += [f"{name} = {_text(getattr(study, name))}" for name in ("tenant", "task", "bundle")]
    if study.publisher_key is not None:
        lines.append(f"publisher_key = {_text(study.publisher_key)}")
    else:
        lines += ["publishers = [", *(f"    {_text(key)}," for key in study.publishers), "]"]
        lines.append(f"publisher_threshold = {study.publisher_threshold}")
    lines.append(f"aggregator_key = {_text(study.aggregator_key)}")
    lines.append(f"broker = {{ host = {_text(study.broker.host)}, port = {study.broker.port} }}")
    if study.helpers:
        rows = [
            f"    {{ name = {_text(one.name)}, operator = {_text(one.operator)}, key = {_text(one.key)} }},"
            for one in study.helpers
        ]
        lines += ["helpers = [", *rows, "]"]
    return "\n".join(lines) + "\n"


def with_section(before: bytes, study: StudyConfig) -> bytes:
    """A configuration with one more study at its end; what was there is there byte for byte.

    Raises:
        ConfigError: it could not be read any more.
    """
    text = section_text(study).encode()
    after = before + (b"" if not before or before.endswith(b"\n") else b"\n") + b"\n" + text
    try:
        decoded = msgspec.toml.decode(after, type=DeviceConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the study cannot be added at the end of the configuration ({error})") from error
    if decoded.studies[-1:] != (study,):
        raise ConfigError("the study cannot be added at the end of the configuration: it would read differently")
    return after


def _check_key(study: str, name: str, here: str, said: str) -> None:
    """Raises ConfigError: a pin in the configuration is not what the study says."""
    if here.strip().lower() != said.strip().lower():
        raise ConfigError(
            f"{study}: {name} is {here[:_MOST]} in this configuration, and the study says {said[:_MOST]}; find out "
            "over another way which is right, mend the configuration, then run this again"
        )


def _text(value: str) -> str:
    """A TOML basic string: JSON's escapes are a part of TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
