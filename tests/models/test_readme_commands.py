"""The README's four commands on the model file in examples/, one after the other, as a user types them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_files import EXAMPLES

from firmware_sim.watch_data import all_wrists, load_recordings, windows_of
from fl_protocol.bundle import ModelBundle, open_bundle
from models.publisher import load_public_key

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

ROOT = EXAMPLES.parent


def opened(path: Path) -> ModelBundle:
    return open_bundle(path.read_bytes(), publisher=load_public_key(path.parent / "publisher.pub"))


def test_build_inspect_train_and_export_as_the_readme_says(tmp_path: Path) -> None:
    recordings = load_recordings(tmp_path / "recordings.npz")
    records = [windows_of(recordings, wrist, samples=128) for wrist in all_wrists()[:4]]
    np.savez(
        tmp_path / "windows.npz", x=np.concatenate([r.x for r in records]), y=np.concatenate([r.y for r in records])
    )
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (covey-model (?:build|inspect|train|export) .*)$", text, re.M)
    assert [command.split()[1] for command in commands] == ["build", "inspect", "train", "export"]
    shown = {}
    for command in ["covey-model key publisher.key", *commands]:
        words = shlex.split(command.replace("examples/", f"{EXAMPLES}/"))
        words += ["--epochs", "2"] if words[1] == "train" else []
        done = subprocess.run(
            [sys.executable, "-m", "models.cli", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        shown[words[1]] = done.stdout
    assert "SeparableConv1D" in shown["inspect"]
    assert "signature good" in shown["inspect"]
    start, trained = opened(tmp_path / "activity.covey"), opened(tmp_path / "trained.covey")
    assert trained.manifest.version == start.manifest.version + 1
    assert "epsilon" in trained.manifest.description
    assert not np.array_equal(trained.params, start.params)
    (exported,) = tmp_path.glob("*.tflite")
    assert exported.stat().st_size > 1000
