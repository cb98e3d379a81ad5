"""A task file: every key has its default, survives being written, and is refused by name where it makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.task_file import (
    Asynchronous,
    EvaluationPlan,
    Participation,
    Rule,
    Server,
    StatisticsPlan,
    TaskConfig,
    TrainingPlan,
    Updates,
    Validation,
    read_task,
    write_task,
)
from fl_protocol.errors import ConfigError

HEAD = """
name = "watch"
bundle = "model.covey"
publisher_key = "00"
rounds = 3
goal = 5
minimum_cohort = 2
round_duration_s = 60.0
engine = "open"
"""
TRAIN = """
[plan]
sampling_rate = 0.1
local_steps = 7
learning_rate = 0.5
l2_norm_clip = 1.0
noise_multiplier = 1.0
expected_batch_size = 10.0
"""
FEATURE = '[[plan.features]]\nname = "x"\nstatistic = "moments"\nchannel = 0\nlow = -1.0\nhigh = 1.0\n'


def read(extra: str = "", *, head: str = "", plan: str = TRAIN) -> TaskConfig:
    return read_task(HEAD + head + plan + extra, "watch.toml")


def test_what_is_left_out_is_what_the_docstrings_say() -> None:
    task = read()
    assert (task.kind, task.start_from, task.most_failures, task.population) == ("train", None, 3, None)
    assert task.server == Server(average_last=1)
    assert task.rule == Rule(name="mean", norm_bound=None, memory_bytes=2**30)
    assert task.participation == Participation(
        probability=1.0,
        steer=False,
        over_selection=1.3,
        least_probability=0.001,
        minimum_separation_s=0.0,
        required_tags=(),
    )
    assert task.updates == Updates(kem="mlkem768-x25519", encodings=("float32",), top_k_fraction=0.1, delta=None)
    assert (task.asynchronous, task.validation) == (None, None)
    policy = task.policy
    assert (policy.mode, policy.maximum_staleness, policy.makes_models) == ("sync", 0, True)


EVERYTHING = """
[server]
average_last = 2
[rule]
norm_bound = 2.5
[asynchronous]
maximum_staleness = 4
weight = "constant"
[participation]
probability = 0.25
steer = true
required_tags = ["imu", "npu"]
[updates]
kem = "x25519"
encodings = ["int8", "float32"]
delta = "int8"
[validation]
data = "held-out.npz"
margin = 0.2
"""


def test_every_table_is_read() -> None:
    task = read(EVERYTHING)
    assert task.asynchronous == Asynchronous(maximum_staleness=4, weight="constant")
    assert task.validation == Validation(data="held-out.npz", margin=0.2)
    assert task.participation.required_tags == ("imu", "npu")
    assert task.updates.encodings == ("int8", "float32")
    assert (task.policy.mode, task.policy.maximum_staleness, task.policy.goal) == ("async", 4, 5)


@pytest.mark.parametrize("extra", ["", EVERYTHING])
def test_what_is_written_reads_back_the_same(extra: str) -> None:
    task = read(extra)
    assert read_task(write_task(task), "again") == task


@pytest.mark.parametrize(
    ("kind", "plan", "type_of"),
    [
        ("train", TRAIN, TrainingPlan),
        ("evaluate", "[plan]\nnoise_multiplier = 2.0\n", EvaluationPlan),
        ("statistics", f"[plan]\nnoise_multiplier = 2.0\n{FEATURE}", StatisticsPlan),
    ],
)
def test_each_kind_has_its_own_plan(kind: str, plan: str, type_of: Any) -> None:
    task = read(head=f'kind = "{kind}"\n', plan=plan)
    assert task.kind == kind
    assert isinstance(task.plan, type_of)
    assert task.policy.makes_models is (kind == "train")
    assert read_task(write_task(task), "again") == task


@pytest.mark.parametrize(
    ("head", "plan", "extra", "words"),
    [
        ("", TRAIN, "[plan", "task file watch.toml"),
        ("typo = 1\n", TRAIN, "", "typo"),
        ("", TRAIN, "[server]\ntypo = 1\n", "typo"),
        ("", TRAIN, "[updates]\ndelta = 'float32'\n", "delta"),
        ("", TRAIN, "[updates]\nencodings = []\n", "encodings"),
        ("", TRAIN, "[participation]\nprobability = 1.5\n", "probability"),
        ("", TRAIN, "[asynchronous]\nmaximum_staleness = -1\n", "maximum_staleness"),
        ("", TRAIN, "[validation]\n", "data"),
        ("", TRAIN, "[rule]\nname = 'best'\n", "name"),
        ("", TRAIN, "[rule]\nname = 'median'\n[asynchronous]\n", "median needs synchronous rounds"),
        ("kind = 'dance'\n", TRAIN, "", "dance"),
        ("kind = 'evaluate'\n", TRAIN, "", "unknown field"),
        ("kind = 'evaluate'\n", "[plan]\nnoise_multiplier = 2.0\n", "[server]\naverage_last = 2\n", "makes no model"),
        (
            "kind = 'evaluate'\n",
            "[plan]\nnoise_multiplier = 2.0\n",
            "[updates]\ndelta = 'int8'\n",
            "leave out encodings",
        ),
        ("kind = 'statistics'\n", "[plan]\nnoise_multiplier = 2.0\nfeatures = []\n", "", "features"),
        (
            "population = 9\n",
            TRAIN + "control_variates = true\n",
            "[asynchronous]\n",
            "control_variates need synchronous",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(head: str, plan: str, extra: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(extra, head=head, plan=plan)
    assert "watch.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("minimum_cohort = 2", "minimum_cohort = 6", "minimum_cohort"),
        ("minimum_cohort = 2", "minimum_cohort = 0", "minimum_cohort"),
        ("rounds = 3", "rounds = 0", "rounds"),
        ("goal = 5", "goal = 0.5", "goal"),
        ("round_duration_s = 60.0", "round_duration_s = inf", "round_duration_s"),
        ('name = "watch"', 'name = "Watch 1"', "name"),
    ],
)
def test_numbers_and_names_have_their_ranges(right: str, wrong: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_task((HEAD + TRAIN).replace(right, wrong), "watch.toml")
