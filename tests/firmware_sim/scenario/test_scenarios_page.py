"""docs/scenarios.md: every key, default and range is the code's, and what it shows is read and told."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import msgspec
import pytest
from msgspec import NODEFAULT

from device_client.config import EligibilityConfig
from firmware_sim.scenario.loading import load_scenario
from firmware_sim.scenario.schema import Curve, Population, Privacy, RolloutTable, Scenario
from firmware_sim.scenario.telling import allowed_by
from firmware_sim.sensors.config import SensorsConfig
from firmware_sim.wearer.habits import Habits

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scenarios.md").read_text()
TABLES: dict[str, type] = {
    "Keys at the top": Scenario,
    "`[privacy]`": Privacy,
    "`[population]`": Population,
    "`[eligibility]`": EligibilityConfig,
    "`[wearers]`": Habits,
    "`[sensors]`": SensorsConfig,
    "`[surrogate]`": Curve,
    "`[rollout]`": RolloutTable,
}
OWN_TABLES = {"privacy", "eligibility", "population", "wearers", "sensors", "surrogate", "rollout"}
ELSEWHERE = {"sensors": {"variation", "season"}, "rollout": {"image"}}
"""Tables of which another page tells."""


def rows(title: str) -> dict[str, tuple[str, str]]:
    """Default and range by key, of the table under a heading."""
    section = PAGE.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    return {
        key: (default, allowed)
        for key, default, allowed in re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*?) \|", section, re.M)
    }


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """A default as the page writes it."""
    if field.default is NODEFAULT:
        return ""
    if isinstance(field.default, datetime.datetime):
        return f"`{field.default:%Y-%m-%dT%H:%M:%SZ}`"
    return "none" if field.default is None else f"`{msgspec.json.encode(field.default).decode()}`"


@pytest.mark.parametrize("title", TABLES)
def test_keys_defaults_and_ranges_are_the_code_s(title: str) -> None:
    kind = TABLES[title]
    left_out = OWN_TABLES if kind is Scenario else ELSEWHERE.get(title.strip("`[]"), set())
    types = {field.encode_name: field.type for field in msgspec.inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    expected = {
        field.encode_name: (default_of(field), allowed_by(types[field.encode_name]))
        for field in msgspec.structs.fields(kind)
        if field.encode_name not in left_out
    }
    assert rows(title) == expected


def test_every_table_of_a_file_has_its_section() -> None:
    assert {f"`[{name}]`" for name in OWN_TABLES} | {"Keys at the top"} == set(TABLES)
    assert {field.encode_name for field in msgspec.structs.fields(Scenario)} >= OWN_TABLES


def test_the_example_is_a_scenario_and_the_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.S | re.M)
    path = tmp_path / "my.toml"
    path.write_text(text)
    assert load_scenario(path).scenario.devices == 10
    path.write_text(text.replace("surrogate", "rael"))
    with pytest.raises(Exception, match="fidelity") as error:
        load_scenario(path)
    assert str(error.value).replace(str(path), "my.toml") in PAGE
