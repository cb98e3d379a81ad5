"""What `covey-model train` reads, writes and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_files import BUNDLES, committed, synthetic
from typer import Typer
from typer.testing import CliRunner

from fl_protocol.adapters.key_files import create_key
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from models.central.checkpoints import CheckpointFolder
from models.central.data import read_records
from models.central.training import (
    State,
)
from models.cli_train import train
from models.publisher import load_public_key, write_public_key
from tests.device_client.ports import PowerCutError

# Data.


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_eight_bit_examples_become_float32_as_they_are(tmp_path: Path) -> None:
    x = np.arange(2 * 128 * 6, dtype=np.uint8).reshape(2, 128, 6)
    records = read_records(
        npz(tmp_path / "d.npz", x=x, y=np.array([0, 6], np.uint8)),
        committed("watch_features").manifest,
        option="--data",
    )
    assert (records.x.dtype, records.y.dtype) == (np.dtype(np.float32), np.dtype(np.int32))
    np.testing.assert_array_equal(records.x, x)


X, Y = np.zeros((3, 128, 6), np.float32), np.zeros(3, np.int32)
SPOILT = X.copy()
SPOILT[1, 5, 5] = np.nan
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"x": X[:, :100], "y": Y}, r"takes x of shape \[n, 128, 6\], got \[3, 100, 6\]"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"got \[0, 128, 6\]"),
    "NaN": ({"x": SPOILT, "y": Y}, r"x\[1\] holds NaN or infinity, 1 examples"),
    "overflow": ({"x": X.astype(np.float64) + 1e300, "y": Y}, r"x\[0\] holds NaN or infinity"),
    "text": ({"x": X.astype(str), "y": Y}, "x holds <U"),
    "no x": ({"z": X}, "there is no array x"),
    "no y": ({"x": X}, "there is no array y"),
    "count": ({"x": X, "y": Y[:2]}, "3 examples in x and y has shape"),
    "range": ({"x": X, "y": Y + 7}, "the labels run from 7 to 7, the model knows 0 to 6"),
    "halves": ({"x": X, "y": Y + 0.5}, "not whole"),
    "NaN label": ({"x": X, "y": np.array([0, 1, np.nan])}, "not whole"),
    "two a row": ({"x": X, "y": np.zeros((3, 2), np.int32)}, "one class index an example"),
    "objects": ({"x": X, "y": np.array([None, 1, "a"])}, "expected an .npz file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_unusable_data_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    arrays, words = UNUSABLE[case]
    with pytest.raises(LocalMisuseError, match=words) as caught:
        read_records(npz(tmp_path / "d.npz", **arrays), committed("watch_features").manifest, option="--data")
    assert str(caught.value).startswith(f"--data {tmp_path / 'd.npz'}: ")


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    manifest = committed("watch_features").manifest
    whole = npz(tmp_path / "d.npz", x=X, y=Y).read_bytes()
    for name, data in (("cut.npz", whole[:-100]), ("text.npz", b"hello"), ("none.npz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LocalMisuseError, match=r"expected an \.npz file"):
            read_records(tmp_path / name, manifest, option="--data")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(LocalMisuseError, match=r"expected an \.npz file"):
        read_records(tmp_path / "one.npy", manifest, option="--data")
    with pytest.raises(LocalMisuseError, match="No such file"):
        read_records(tmp_path / "nowhere.npz", manifest, option="--data")


# The command.

app = Typer()
app.command()(train)


def run_train(*arguments: object) -> str:
    """Run it in this process; errors of ours come out as they are."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A publisher's key, and data."""
    write_public_key(create_key(tmp_path / "publisher.key"), tmp_path)
    for name, seed in (("train", 0), ("test", 1)):
        records = synthetic(seed=seed)
        npz(tmp_path / f"{name}.npz", x=records.x, y=records.y)
    return tmp_path


def options(folder: Path, *more: object, out: str = "out.covey") -> list[object]:
    given = ["--data", folder / "train.npz", "--out", folder / out, "--key", folder / "publisher.key"]
    return [BUNDLES / "watch_features.covey", *given, "--batch-size", 35, *more]


def test_a_trained_bundle_is_signed_says_what_it_cost_and_infers_with_its_parameters(folder: Path) -> None:
    shown = run_train(
        *options(folder, "--epsilon", 3, "--epochs", 3, "--validation", folder / "test.npz"),
        "--report",
        folder / "report.json",
    )
    assert "epoch 3/3, step 6/6, validation loss" in shown
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    start = committed("watch_features")
    assert bundle.manifest.version == start.manifest.version + 1
    assert bundle.manifest.description.startswith(start.manifest.description)
    assert "Trained centrally for 6 steps on train, record-level epsilon 2.9999 at delta 1e-05 (Poisson DP-SGD" in (
        bundle.manifest.description
    )
    assert bundle.graph == start.graph
    assert not np.array_equal(bundle.params, start.params)
    assert bundle.params.tobytes() in bundle.infer_template
    report = json.loads((folder / "report.json").read_text())
    assert report["privacy"]["noisy_sums_charged"] == report["steps"] == 6
    assert 2.99 < report["privacy"]["epsilon"] <= 3.0
    assert report["measured"].keys() == {"loss", "accuracy"}
    assert [each["step"] for each in report["history"]] == [2, 4, 6]


def test_without_privacy_it_is_said_everywhere(folder: Path) -> None:
    more = ("--steps", 40, "--learning-rate", 10, "--validation", folder / "test.npz", "--report", folder / "r.json")
    shown = run_train(*options(folder, "--no-dp", *more))
    assert "NO PRIVACY: --no-dp" in shown
    assert "no privacy" in shown.splitlines()[-4]
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    assert bundle.manifest.description.endswith("Trained centrally for 40 steps on train without privacy.")
    report = json.loads((folder / "r.json").read_text())
    assert report["privacy"]["epsilon"] is None
    assert report["measured"]["accuracy"] > 0.5
    shown = run_train(
        *options(folder, "--epsilon", 3, "--steps", 4, "--seed", 1, "--report", folder / "s.json", out="s")
    )
    assert "NO PRIVACY: noise from a --seed" in shown
    assert "epsilon" not in shown
    assert json.loads((folder / "s.json").read_text())["privacy"]["epsilon"] is None


def test_nothing_is_measured_on_private_data(folder: Path) -> None:
    shown = run_train(*options(folder, "--epsilon", 3, "--steps", 4, "--report", folder / "r.json"))
    assert "a loss on the private data is not covered by epsilon" in shown
    assert "validation" not in shown.replace("--validation", "")
    assert json.loads((folder / "r.json").read_text())["measured"] == {}


def test_the_command_resumes_and_says_what_was_charged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = options(folder, "--epsilon", 3, "--steps", 12, "--checkpoint", folder / "run", "--checkpoint-every", 4)
    saves: list[State] = []
    save = CheckpointFolder.save

    def cut(self: CheckpointFolder, state: State) -> None:
        saves.append(state)
        if len(saves) == 2:
            raise PowerCutError
        save(self, state)

    monkeypatch.setattr(CheckpointFolder, "save", cut)
    with pytest.raises(PowerCutError):
        run_train(*command)
    assert not (folder / "out.covey").exists()
    shown = run_train(*command)
    assert "Resumed at step 4; 8 noisy sums were charged before." in shown
    assert "Ended 4 steps early" in shown
    bundle = open_bundle((folder / "out.covey").read_bytes(), publisher=load_public_key(folder / "publisher.pub"))
    assert "for 8 steps on train, record-level epsilon 3.0000" in bundle.manifest.description
    assert "12 noisy sums" in bundle.manifest.description


def test_what_cannot_be_done_is_refused_before_training(folder: Path) -> None:
    def refused(words: str, *more: object, error: type[Exception] = LocalMisuseError, **rest: str) -> None:
        with pytest.raises(error, match=words):
            run_train(*options(folder, *more, **rest))

    refused("one of --epsilon, --noise-multiplier and --no-dp")
    refused("one of --epsilon, --noise-multiplier and --no-dp", "--no-dp", "--epsilon", 1)
    refused("--epochs or --steps", "--no-dp", "--epochs", 1, "--steps", 1)
    refused("such as tail:0.5", "--no-dp", "--average", "tail:x")
    refused("such as tail:0.5", "--no-dp", "--average", "tail:2")
    refused("expected 1 to 70", "--no-dp", "--batch-size", 71)
    (folder / "there.covey").write_bytes(b"")
    refused(r"there\.covey exists: .* --force", "--no-dp", out="there.covey")
    stranger = folder / "stranger.pub"
    stranger.write_text("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a\n")
    refused("not signed by the pinned publisher", "--no-dp", "--verify", stranger, error=BundleError)
    with pytest.raises(LocalMisuseError, match="the key of another publisher"):
        run_train(
            BUNDLES / "watch_features.covey", "--data", folder / "train.npz", "--out", folder / "o.covey", "--no-dp"
        )


def test_plain_training_needs_no_tensorflow(folder: Path) -> None:
    program = (
        "import sys; from typer import Typer; from models.cli_train import train\n"
        "app = Typer(); app.command()(train); app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'tensorflow', 'tensorflow_privacy', 'keras', 'aggregator'} & set(sys.modules)\n"
    )
    command = [str(each) for each in options(folder, "--epsilon", 3, "--steps", 2)]
    subprocess.run([sys.executable, "-c", program, *command], check=True, cwd=Path(__file__).parents[2])
