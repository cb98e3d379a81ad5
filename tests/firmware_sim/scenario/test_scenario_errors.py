"""What is wrong in a scenario file is told with its line, its key, what is allowed and what came."""

from __future__ import annotations

from pathlib import Path

import pytest

from firmware_sim.fleet.simulation import begin_run
from firmware_sim.scenario.loading import SHIPPED, load_scenario
from fl_protocol.errors import ConfigError

TEXT = (SHIPPED / "flaky-devices.toml").read_text() + '\n[sensors]\nkind = "replay"\n\n[privacy]\nepsilon = 3.0\n'
TOP, TABLE = "seed = 1\n", "\n[wearers]\nward = false\n"
WRONG: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("seed = 1", "sede = 1", "sede", ("expected", "seed", "got 1")),
    ("rounds = 12", "runds = 12", "task.runds", ("expected", "rounds", "got 12")),
    ("rounds = 12", 'name = "x"', "task.name", ("covey sets it itself", "got 'x'")),
    ("local_steps = 8", "local_setps = 8", "task.plan.local_setps", ("local_steps", "got 8")),
    ("epsilon = 3.0", "epsilom = 3.0", "privacy.epsilom", ("epsilon", "got 3.0")),
    ("raspberry_pi_4 = 1", "raspbery = 1", "population.profiles.raspbery", ("raspberry_pi_4", "'raspbery'")),
    ("raspberry_pi_4 = 1", "raspberry_pi_4 = 0", "population.profiles.raspberry_pi_4", ("more than 0", "got 0")),
    ('kind = "replay"', 'kind = "replay"\nnoise = 1', "sensors.noise", ("label_noise", "got 1")),
    ('kind = "replay"', 'kind = "film"', "sensors.kind", ("none, replay, synthetic", "got 'film'")),
    ('kind = "replay"', 'kind = "replay"\nlabel_noise = 3.0', "sensors.label_noise", ("0 to 1", "got 3")),
    ("reboots_every_s = 90.0", "reboots = 90.0", "reboots", ("reboots_every_s", "got 90.0")),
    ("by_s = 7200.0", 'by_s = "much"', "by_s", ("float", "got 'much'")),
    ('kind = "hang"', 'kind = "hank"', "kind", ("hang", "got 'hank'")),
    ('"surrogate"', '"rael"', "fidelity", ("noop, real, recorded, surrogate", "got 'rael'")),
    ("devices = 60", "devices = 0", "devices", ("at least 1", "got 0")),
    ("devices = 60", "devices = 1.5", "devices", ("a whole number", "got 1.5")),
    ("begins = 2026-03-02T00:00:00Z", 'begins = "noon"', "begins", ("2026-03-02T00:00:00Z", "got 'noon'")),
    ("begins = 2026-03-02T00:00:00Z", "begins = 2026-03-02", "begins", ("a moment", "got 2026-03-02")),
    ('engine = "open"', 'engine = "opn"', "task.engine", ("open, secure", "got 'opn'")),
    ('"watch_cnn"', '"wath_cnn"', "model", ("watch_cnn", "wath_cnn")),
    (
        "[population.profiles]\n",
        '[population]\ntraces = "t.csv"\n[population.profiles]\n',
        "population.traces",
        ("a CSV file", "got 't.csv'"),
    ),
    (
        "[population.profiles]\n",
        '[population]\nown_profiles = "mine"\n[population.profiles]\n',
        "population.own_profiles",
        ("a folder", "got 'mine'"),
    ),
    ('"surrogate"', '"recorded"\nrecorded = "old"', "recorded", ("the folder of a run", "got 'old'")),
    ('"watch_cnn"', f'"my.covey"\npublisher_key = "{"11" * 32}"', "model", ("readable file", "my.covey")),
    ("require_idle = false", "require_idle = 3", "eligibility.require_idle", ("true or false", "got 3")),
    ("require_idle = false", 'season = "mild"', "eligibility.season", ("require_idle", "got 'mild'")),
]


def scenario(folder: Path, right: str = "", wrong: str = "") -> Path:
    path = folder / "mine.toml"
    assert right in TEXT
    path.write_text(TEXT.replace(right, wrong, 1) if right else TEXT)
    return path


def test_the_text_is_right_before_something_is_made_wrong(tmp_path: Path) -> None:
    assert load_scenario(scenario(tmp_path)).scenario.devices == 60


@pytest.mark.parametrize(("right", "wrong", "key", "told"), WRONG, ids=[f"{one[2]}: {one[1][:24]!r}" for one in WRONG])
def test_an_error_says_line_key_what_is_allowed_and_what_came(
    tmp_path: Path, right: str, wrong: str, key: str, told: tuple[str, ...]
) -> None:
    path = scenario(tmp_path, right, wrong)
    name = key.rsplit(".", 1)[-1]
    number = 1 + TEXT[: TEXT.index(right)].count("\n")
    lines = path.read_text().splitlines()
    number = next(n for n in range(number, len(lines) + 1) if lines[n - 1].startswith(name))
    with pytest.raises(ConfigError) as error:
        load_scenario(path)
    assert f"line {number}: " in str(error.value)
    assert f"{key}: " in str(error.value)
    for one in told:
        assert one in str(error.value)


def test_a_missing_key_is_named_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"devices: this key is missing; expected a whole number, at least 1"):
        load_scenario(scenario(tmp_path, "devices = 60\n", ""))
    with pytest.raises(ConfigError, match=r"line \d+: task.rounds: this key is missing"):
        load_scenario(scenario(tmp_path, "rounds = 12\n", ""))


def test_what_is_no_toml_or_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at line 3"):
        load_scenario(scenario(tmp_path, "seed = 1", "seed 1"))
    with pytest.raises(ConfigError, match=r"no such file; expected a path, or one of .*first-round"):
        load_scenario(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="readable TOML file"):
        load_scenario(tmp_path / "bytes.toml")


def test_a_run_s_folder_has_what_its_scenario_names(tmp_path: Path) -> None:
    """The earlier run may go away, and the run's folder may move."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "fleet.json").write_text("{}")
    wrong = '"recorded" # old\nrecorded = "old" # not "old"'
    loaded = load_scenario(scenario(tmp_path, '"surrogate"', wrong))
    begun = begin_run(tmp_path / "run", loaded)
    (old / "fleet.json").unlink()
    moved = begun.path.parent.rename(tmp_path / "elsewhere")
    kept = load_scenario(moved / "scenario.toml")
    assert kept.scenario.recorded == "recorded"
    assert (moved / "recorded" / "fleet.json").read_text() == "{}"
    assert '"recorded" # old' in kept.text
    with pytest.raises(ConfigError, match="recorded"):
        load_scenario(tmp_path / "mine.toml")
