"""The command covey-model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bundle_files import BUNDLES

from fl_protocol.adapters.key_files import create_key
from fl_protocol.bundle import open_bundle
from models.publisher import load_public_key


def covey_model(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "models.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_help_and_list_do_not_import_tensorflow() -> None:
    program = (
        "import sys, models, models.cli, models.specs, models.catalog\n"
        "from typer.testing import CliRunner\n"
        "for words in (['--help'], ['build', '--help'], ['list']):\n"
        "    assert CliRunner().invoke(models.cli.app, words).exit_code == 0\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_shows_examples_and_the_models_are_listed() -> None:
    assert "covey-model build all --out-dir" in covey_model("--help").stdout
    assert "watch_features" in covey_model("list").stdout
    assert covey_model("--version").stdout.startswith("covey-model ")


def test_a_bundle_of_another_publisher_is_refused_in_one_sentence(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pub"
    stranger.write_text("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a\n")
    shown = covey_model("inspect", BUNDLES / "watch_features.covey", "--verify", stranger)
    assert shown.returncode == 4
    assert "not signed by the pinned publisher" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_key_is_never_overwritten_and_is_private(tmp_path: Path) -> None:
    key = tmp_path / "publisher.key"
    assert covey_model("key", key).returncode == 0
    before = key.read_text()
    assert key.stat().st_mode & 0o077 == 0
    assert covey_model("key", key).returncode == 1
    assert key.read_text() == before


@pytest.mark.tensorflow
def test_a_built_bundle_opens_with_the_key_written_beside_it(tmp_path: Path) -> None:
    create_key(tmp_path / "k")
    out = tmp_path / "made" / "w.covey"
    built = covey_model("build", "watch_features", "--out", out, "--key", tmp_path / "k", "--version", "3")
    assert built.returncode == 0, built.stderr
    bundle = open_bundle(out.read_bytes(), publisher=load_public_key(out.parent / "publisher.pub"))
    assert (bundle.manifest.version, bundle.manifest.batch_size) == (3, 32)
    shown = covey_model("inspect", out)
    assert "logits/kernel" in shown.stdout
    assert "BATCH_MATMUL" in shown.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["publisher.pub", "w.covey"]


def test_files_that_must_not_be_replaced_are_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    create_key(tmp_path / "k")
    assert covey_model("key", tmp_path / "no" / "folder").stderr.count("cannot be written") == 1
    (tmp_path / "other" / "publisher.pub").write_text("11" * 32)
    stranger = covey_model("build", "watch_features", "--out", tmp_path / "other" / "w.covey", "--key", tmp_path / "k")
    assert (stranger.returncode, "another publisher" in stranger.stderr) == (1, True)
    folder = covey_model("build", "watch_features", "--out", tmp_path / "other", "--key", tmp_path / "k")
    assert "is a folder" in folder.stderr
    data = tmp_path / "d.npz"
    data.touch()
    arguments = ("--no-dp", "--data", data, "--key", tmp_path / "k")
    for out, report, word in (
        (tmp_path / "t.covey", tmp_path / "t.covey", "used for something else"),
        (tmp_path / "k", tmp_path / "r", "used for something else"),
        (tmp_path / "publisher.pub", tmp_path / "r", "used for something else"),
        (tmp_path / "other", tmp_path / "r", "is a folder"),
    ):
        shown = covey_model(
            "train", BUNDLES / "watch_features.covey", *arguments, "--out", out, "--report", report, "--force"
        )
        assert (shown.returncode, word in shown.stderr) == (1, True), shown.stderr
