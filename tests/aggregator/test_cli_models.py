"""``covey-aggregator model``: versions with where they came from, tags, rollback, and a version as files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, rdp

from aggregator.assembly import AggregatorFiles
from aggregator.lineage_privacy import Lineage, lineage_of
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError
from fl_protocol.signing import public_key_from_hex, public_key_hex
from tests.aggregator.operator_desk import PUBLISHER, TRAINING, Operator, Running, one_sentence, operator
from tests.enrolments import broken_copy

__all__ = ["operator"]


@pytest.fixture
def trained(operator: Operator) -> Running:
    """Two rounds of three are committed: versions 0, 1 and 2."""
    operator.says("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    running = Running(operator)
    operator.patch.setattr("time.sleep", lambda _seconds: running.steps(1))
    running.round("watch")
    running.round("watch")
    return running


def test_a_task_whose_publisher_is_the_aggregator_is_not_created(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    own = public_key_hex(AggregatorFiles.load(operator.config).signing_key().public_key())
    operator.edit("watch.toml", PUBLISHER, own)
    told = operator.run("task", "create", "./watch.toml", "CONFIG")
    one_sentence(told, 2, "got the aggregator's own among them", "publisher keygen")


def test_versions_are_listed_with_lineage_metrics_and_tags(operator: Operator, trained: Running) -> None:
    assert (
        operator.says("model", "tag", "watch", "1", "released", "CONFIG") == "version 1 of watch has the tag released\n"
    )
    found = operator.json("model", "list", "watch", "CONFIG")
    assert [(one["version"], one["parent"], one["origin"], one["tags"]) for one in found] == [
        (0, None, "initial", []),
        (1, 0, "round", ["released"]),
        (2, 1, "round", []),
    ]
    shown = operator.json("model", "show", "watch", "released", "CONFIG")
    assert (shown["model"]["version"], shown["lineage"]) == (1, [1, 0])
    assert shown["model"]["metrics"]["mean_update_norm"] == pytest.approx(0.01 * 378**0.5, rel=1e-3)
    for words in ("released", "round", "ε at most"):
        assert words in operator.says("model", "list", "watch", "CONFIG")
    for words in ("mean_update_norm", "round 1", "in all 1 rounds behind it"):
        assert words in operator.says("model", "show", "watch", "1", "CONFIG")


def epsilon(steps: int) -> float:
    """The oracle: whole batches, so a Gaussian mechanism a step."""
    accountant = rdp.RdpAccountant()
    accountant.compose(GaussianDpEvent(8.0), steps)
    return float(accountant.get_epsilon(1e-5))


def test_privacy_spent_is_that_of_the_rounds_behind_a_version(operator: Operator, trained: Running) -> None:
    found = [one["record_epsilon"] for one in operator.json("model", "list", "watch", "CONFIG")]
    assert found[0] == 0
    for steps in (1, 2):
        assert epsilon(steps) <= found[steps] * (1 + 1e-6)
        assert found[steps] == pytest.approx(epsilon(steps), rel=0.02)


def test_a_rollback_leaves_rounds_out_and_a_task_that_starts_from_a_version_takes_them_over(
    operator: Operator, trained: Running
) -> None:
    assert operator.says("model", "rollback", "watch", "1", "CONFIG") == "watch goes on from version 1\n"
    listed = operator.json("model", "list", "watch", "CONFIG")
    assert [(one["version"], one["parent"], one["origin"]) for one in listed[3:]] == [(3, 1, "rollback")]
    assert listed[3]["digest"] == listed[1]["digest"]
    assert listed[3]["record_epsilon"] == listed[1]["record_epsilon"]
    operator.write("more.toml", TRAINING.replace('"watch"', '"more"\nstart_from = "watch/2"', 1))
    operator.says("task", "create", "./more.toml", "CONFIG")
    (first,) = operator.json("model", "list", "more", "CONFIG")
    assert first["digest"] == listed[2]["digest"]
    assert first["record_epsilon"] == listed[2]["record_epsilon"]
    assert "in all 2 rounds behind it" in first["privacy"]


def check_figures(operator: Operator, lineage_of: Callable[[AggregatorStore, str], Lineage]) -> None:
    """Each at least what the oracle says of the rounds behind it, and not far above."""
    store = operator.store()
    for task, rounds in (("watch", {0: 0, 1: 1, 2: 2, 3: 1}), ("more", {0: 2})):
        lineage = lineage_of(store, task)
        for version, steps in rounds.items():
            found, words = lineage.spent(version)
            assert found == pytest.approx(epsilon(steps) if steps else 0.0, rel=0.02)
            assert f"in all {steps} rounds" in words
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        ('before + (record.origin == "round")', "before"),
        (
            "before = rounds[record.parent] if record.parent is not None else 0",
            "before = max(rounds.values(), default=0)",
        ),
        ("first=records[0]) if start else ()", "first=records[0]) if False else ()"),
        ("spent = [(plan, count) for plan, count in rounds if count]", "spent = list(rounds)[:1]"),
    ],
)
def test_a_broken_copy_of_the_lineage_is_caught(operator: Operator, trained: Running, change: tuple[str, str]) -> None:
    operator.says("model", "rollback", "watch", "1", "CONFIG")
    operator.write("more.toml", TRAINING.replace('"watch"', '"more"\nstart_from = "watch/2"', 1))
    operator.says("task", "create", "./more.toml", "CONFIG")
    check_figures(operator, lineage_of)
    check_figures(operator, broken_copy("aggregator.lineage_privacy").lineage_of)
    broken = broken_copy("aggregator.lineage_privacy", change)
    with pytest.raises(AssertionError):
        check_figures(operator, broken.lineage_of)


def test_without_noise_there_is_no_bound(operator: Operator) -> None:
    operator.edit("watch.toml", "noise_multiplier = 8.0", "noise_multiplier = 0.0")
    operator.says("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    running = Running(operator)
    running.round("watch")
    found = operator.json("model", "list", "watch", "CONFIG")[1]
    assert found["record_epsilon"] is None
    assert found["privacy"].startswith("no noise, so no bound")
    assert "?" in operator.says("model", "list", "watch", "CONFIG")


def test_a_rollback_to_what_is_not_there_is_one_sentence(operator: Operator, trained: Running) -> None:
    for name in ("9", "released"):
        one_sentence(operator.run("model", "rollback", "watch", name, "CONFIG"), 3, name, "model list watch")
    one_sentence(operator.run("model", "rollback", "watch", "2", "CONFIG"), 1, "in force already")
    store = trained.service.store
    with store.database.transaction() as connection:
        blobs = store.models.prune(connection, "watch", keep_last=1)
    assert blobs
    one_sentence(operator.run("model", "rollback", "watch", "1", "CONFIG"), 1, "pruned")
    assert "(pruned)" in operator.says("model", "list", "watch", "CONFIG")
    assert store.tasks.pending_orders() == []


def test_a_version_that_is_pruned_after_it_was_asked_for_holds_nothing_up(operator: Operator, trained: Running) -> None:
    store = trained.service.store
    asked = store.tasks.ask("watch", "rollback", argument="1", now_s=trained.now_s)
    with store.database.transaction() as connection:
        store.models.prune(connection, "watch", keep_last=1)
    trained.steps(2)
    (order,) = [one for one in operator.json("task", "show", "watch", "CONFIG")["orders"] if one["id"] == asked]
    assert "were pruned; choose another version" in order["outcome"]
    assert "degraded" not in trained.journal.names
    trained.round("watch")
    assert operator.json("task", "show", "watch", "CONFIG")["state"]["phase"] == "finished"


def test_tags_are_words(operator: Operator, trained: Running) -> None:
    one_sentence(operator.run("model", "tag", "watch", "1", "7", "CONFIG"), 1, "expected a word")
    one_sentence(operator.run("model", "tag", "watch", "1", "Very Good", "CONFIG"), 1, "tag")
    operator.says("model", "tag", "watch", "1", "candidate", "CONFIG")
    operator.says("model", "tag", "watch", "2", "candidate", "CONFIG")
    assert [one["tags"] for one in operator.json("model", "list", "watch", "CONFIG")] == [[], [], ["candidate"]]


def test_a_version_is_exported_as_a_bundle_that_its_publisher_signs_and_for_inference(
    operator: Operator, trained: Running
) -> None:
    operator.says("model", "tag", "watch", "1", "released", "CONFIG")
    origin = open_bundle(
        (operator.folder / "model.covey").read_bytes(),
        publisher=public_key_from_hex(TRAINING.split('publisher_key = "')[1][:64]),
    )
    store, aggregator = trained.service.store, operator.says("init", "CONFIG").strip()
    key = operator.says("publisher", "keygen", "--out", "./publisher.key").strip()
    for number, (version, options) in enumerate(
        [(2, []), (1, ["--tag", "released"]), (1, ["--version", "1"]), (0, ["--version", "0"])]
    ):
        code, out, err = operator.run("model", "export", "watch", "CONFIG", "--out", f"./out{number}", *options)
        folder = operator.folder / f"out{number}"
        assert (code, out.split()) == (0, [str(folder / "model.covey"), str(folder / "model.tflite")])
        assert "model.covey is not signed: no device takes it before" in err
        unsigned = (folder / "model.covey").read_bytes()
        for pinned in (key, aggregator, PUBLISHER):
            with pytest.raises(BundleError, match="nobody has signed it"):
                open_bundle(unsigned, publisher=public_key_from_hex(pinned))
        signing = ["--out", f"./signed{number}", *options, "--publisher-key", "./publisher.key"]
        operator.says("model", "export", "watch", "CONFIG", *signing)
        signed = (operator.folder / f"signed{number}" / "model.covey").read_bytes()
        operator.says("publisher", "sign", f"./out{number}/model.covey", "--key", "./publisher.key")
        assert (folder / "model.covey").read_bytes() == signed
        bundle = open_bundle(signed, publisher=public_key_from_hex(key))
        params = origin.with_personal(store.models.params(store.models.record("watch", version)))
        np.testing.assert_array_equal(bundle.params, params)
        assert bundle.manifest.version == origin.manifest.version + version
        assert (folder / "model.tflite").read_bytes() == origin.inference_model(params)


@pytest.mark.parametrize("form", ["raw", "hex"])
def test_the_aggregators_own_key_never_signs_a_model(operator: Operator, trained: Running, form: str) -> None:
    del trained
    raw = (operator.folder / "keys" / "aggregator.key").read_bytes()
    path = operator.folder / "copied.key"
    path.write_bytes(raw if form == "raw" else raw.hex().encode())
    path.chmod(0o600)
    export = ["model", "export", "watch", "CONFIG", "--out", "./o", "--publisher-key"]
    one_sentence(operator.run(*export, "./copied.key"), 2, "is the aggregator's own key", "publisher keygen")
    assert not (operator.folder / "o").exists()
    one_sentence(operator.run(*export, "./gone.key"), 1, "gone.key cannot be read", "publisher keygen")


def test_an_export_that_cannot_be_is_one_sentence(operator: Operator, trained: Running) -> None:
    (operator.folder / "file").write_text("")
    export = ["model", "export", "watch", "CONFIG", "--out"]
    one_sentence(operator.run(*export, "./file/x"), 2, "--out")
    one_sentence(operator.run(*export, "./o", "--tag", "released"), 3, "released")
    one_sentence(operator.run(*export, "./o", "--version", "9"), 3, "no model version 9")
    one_sentence(operator.run(*export, "./o", "--version", "1", "--tag", "a"), 2, "--version or --tag")
    for command in (["list"], ["show", "0"], ["tag", "0", "a"], ["rollback", "0"]):
        one_sentence(operator.run("model", command[0], "watsh", *command[1:], "CONFIG"), 3, "no task watsh")
