"""docs/tasks.md: every example is a task, and every key and default that it names is the task file's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import NODEFAULT

from aggregator.secure_sections import DevicePrivacy, Secure
from aggregator.server_optimisers import DEFAULTS
from aggregator.task_file import (
    Asynchronous,
    EvaluationPlan,
    Participation,
    Release,
    Rule,
    Server,
    StatisticsPlan,
    TaskConfig,
    TrainingPlan,
    Updates,
    Validation,
    read_task,
)
from fl_protocol.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.S | re.M)
TABLES: dict[str, type] = {
    "Keys at the top": TaskConfig,
    "`[plan]` of a training": TrainingPlan,
    "`[secure]`": Secure,
    "`[device_privacy]`": DevicePrivacy,
    "`[server]`": Server,
    "`[rule]`": Rule,
    "`[asynchronous]`": Asynchronous,
    "`[participation]`": Participation,
    "`[updates]`": Updates,
    "`[validation]`": Validation,
    "`[release]`": Release,
}
SECTIONS = {
    "plan",
    "server",
    "rule",
    "asynchronous",
    "participation",
    "updates",
    "validation",
    "secure",
    "device_privacy",
    "release",
}
IN_WORDS = {"norm_bound": None, "memory_bytes": 2**30, "start_from": None, "population": None, "delta": None}
IN_WORDS |= {"step": None, "adaptive_clipping": None, "most_updates": None, "most_participations": None}
IN_WORDS |= {"publisher_key": None, "publisher_threshold": None}


def table(title: str) -> dict[str, str]:
    """Key and default of each row under a heading."""
    section = PAGE.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\|", section, re.M))


def test_every_kind_and_way_has_an_example() -> None:
    tasks = [read_task(text, "docs/tasks.md") for text in EXAMPLES]
    assert {task.kind for task in tasks} == {"train", "evaluate", "statistics"}
    assert any(task.asynchronous is not None for task in tasks)
    assert any(task.rule.name != "mean" and task.validation is not None for task in tasks)
    assert any(task.participation.steer and task.updates.delta for task in tasks)
    assert len({task.name for task in tasks}) == len(tasks)


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: re.findall(r'^name = "(.*?)"', text, re.M)[0])
def test_an_example_is_a_task_and_misspelt_it_is_none(text: str) -> None:
    read_task(text, "docs/tasks.md")
    with pytest.raises(ConfigError, match="gaol"):
        read_task(text.replace("goal =", "gaol ="), "docs/tasks.md")


@pytest.mark.parametrize("title", TABLES)
def test_a_table_has_exactly_the_keys_of_its_section(title: str) -> None:
    names = {field.encode_name for field in msgspec.structs.fields(TABLES[title])} - SECTIONS
    assert set(table(title)) - {"kind"} == names


@pytest.mark.parametrize("title", TABLES)
def test_defaults_are_the_code_s(title: str) -> None:
    rows = table(title)
    for field in msgspec.structs.fields(TABLES[title]):
        if field.name in SECTIONS or (TABLES[title] is Server and field.name != "average_last"):
            continue
        shown = rows[field.encode_name]
        if field.name in {"local_steps", "local_epochs"} or field.default is NODEFAULT:
            assert shown == "" or field.name == "name", (title, field.name, shown)
        elif field.name in IN_WORDS:
            assert field.default == IN_WORDS[field.name], field.name
            assert shown in {"none", "1 GiB"}, (title, field.name, shown)
        else:
            assert shown == as_toml(field.default), (title, field.name)


def as_toml(value: Any) -> str:
    """A default as the page writes it."""
    return f"`{msgspec.json.encode(value).decode()}`"


def test_the_optimisers_defaults_are_the_code_s() -> None:
    adaptive = [DEFAULTS[name] for name in ("fedadagrad", "fedadam", "fedyogi")]
    assert DEFAULTS["fedavg"].learning_rate == DEFAULTS["fedavgm"].learning_rate == 1
    assert {one.learning_rate for one in adaptive} == {0.1}
    assert {one.tau for one in adaptive} == {0.001}
    assert {one.second_momentum for one in adaptive} == {None, 0.99}
    assert {name: one.momentum for name, one in DEFAULTS.items()} == {
        "fedavg": None,
        "fedavgm": 0.9,
        "fedadagrad": 0.0,
        "fedadam": 0.9,
        "fedyogi": 0.9,
    }


def test_the_plans_of_evaluation_and_statistics_are_shown_whole() -> None:
    by_kind = {str(task.kind): text for text in EXAMPLES for task in [read_task(text, "docs/tasks.md")]}
    for kind, plan in (("evaluate", EvaluationPlan), ("statistics", StatisticsPlan)):
        for field in msgspec.structs.fields(plan):
            assert re.search(rf"^(\[\[plan\.)?{field.name}( =|\]\])", by_kind[kind], re.M), (kind, field.name)
            if isinstance(field.default, float):
                assert re.search(rf"^{field.name} = {field.default} +# the default", by_kind[kind], re.M), field.name
