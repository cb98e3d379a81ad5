from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import clipping
from benchmarks.peers.client import SCRIPTS, Peer, PeerError
from benchmarks.peers.environments import STAMP, PeerMissingError, Requirements, prepare

LIBRARY = f"""
import os, random, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
import clipping, serve

SIZE = 10_000
GRADIENTS = [[(number + 1) * (-1) ** place / SIZE**0.5 for place in range(SIZE)] for number in range(4)]

def trainer(setting, clips=True, noise=True, during=lambda: None):
    parameters = [0.0] * SIZE
    mean = clipping.clipped_mean(GRADIENTS, setting.clip if clips else float("inf"))
    spread = setting.noise_multiplier * setting.clip / setting.batch_size if noise else 0.0
    chance = random.Random(0)
    def step():
        during()
        for place in range(SIZE):
            parameters[place] -= setting.learning_rate * (mean[place] + chance.gauss(0.0, spread))
    return serve.Trainer(step, lambda: list(parameters))

def timed_only(action):
    def build(setting):
        calls = []
        def during():
            calls.append(None)
            if len(calls) > serve.WARM_UP_CALLS:
                action()
        return trainer(setting, during=during)
    return build

def die():
    sys.stderr.write("out of memory\\n")
    sys.stderr.flush()
    os._exit(3)

def refuse(setting):
    raise serve.UnsupportedError("no rule for this layer")

def fail(setting):
    raise ValueError("shapes differ\\nand much more")

serve.main(
    serve.Library(
        versions={{"library": "1.0"}},
        parameters=SIZE,
        modes={{
            "plain": serve.Mode(lambda setting: trainer(setting, clips=False, noise=False), private=False),
            "private": serve.Mode(trainer, private=True),
            "unclipped": serve.Mode(lambda setting: trainer(setting, clips=False), private=True),
            "noiseless": serve.Mode(lambda setting: trainer(setting, noise=False), private=True),
            "refuses": serve.Mode(refuse, private=True),
            "raises": serve.Mode(fail, private=True),
            "prints": serve.Mode(timed_only(lambda: print("{{not json")), private=True),
            "dies": serve.Mode(timed_only(die), private=True),
            "hangs": serve.Mode(timed_only(lambda: time.sleep(600)), private=True),
        }},
        naive_gradients=lambda count: GRADIENTS[:count],
    )
)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "library_steps.py"
    path.write_text(LIBRARY, encoding="utf-8")
    return path


@pytest.fixture
def peer(script: Path) -> Iterator[Peer]:
    with Peer("library", sys.executable, script=script) as started:
        yield started


def test_a_peer_says_what_it_is_and_times_the_calls_it_was_asked_for(peer: Peer) -> None:
    assert (peer.ready.versions, peer.ready.parameters) == ({"library": "1.0"}, 10_000)
    assert peer.ready.supported == ["plain", "private", "prints", "dies", "hangs"]
    assert [len(peer.time(mode, calls)) for mode, calls in (("plain", 2), ("private", 3), ("plain", 1))] == [2, 3, 1]
    assert min(peer.time("private", 2)) > 0
    assert peer.close() > 0
    assert peer.close() == peer.peak_rss_mb


def test_a_mode_proves_that_it_clips_and_adds_noise_before_it_is_timed(peer: Peer) -> None:
    assert peer.ready.check["plain"] < 1e-6
    assert peer.ready.check["private"] < 1e-6
    assert peer.ready.noise["private"] == pytest.approx(1.0, abs=clipping.NOISE_TOLERANCE)
    assert "plain" not in peer.ready.noise
    assert peer.ready.modes["unclipped"] == "unsupported: its gradient is off the naively clipped one by 2.5e-01"
    assert peer.ready.modes["noiseless"] == "unsupported: its noise multiplier is 0.00 where 1.00 was set"


def test_an_unsupported_mode_says_why_and_is_not_timed(peer: Peer) -> None:
    assert peer.ready.modes["refuses"] == "unsupported: no rule for this layer"
    assert peer.ready.modes["raises"] == "unsupported: ValueError: shapes differ"
    with pytest.raises(
        PeerError, match=r"^The peer library cannot time refuses: unsupported: no rule for this layer\.$"
    ):
        peer.time("refuses", 1)
    with pytest.raises(PeerError, match="cannot time misspelt: there is no such mode"):
        peer.time("misspelt", 1)
    assert len(peer.time("private", 1)) == 1


def test_what_a_library_prints_does_not_disturb_the_conversation(peer: Peer) -> None:
    assert len(peer.time("prints", 2)) == 2


def test_a_peer_that_dies_midway_is_named_with_its_last_words(peer: Peer) -> None:
    with pytest.raises(PeerError, match=r"^The peer library ended too early; its last words: out of memory$"):
        peer.time("dies", 1)
    with pytest.raises(PeerError, match=r"^The peer library is not running\.$"):
        peer.time("private", 1)


def test_a_peer_that_hangs_is_ended(script: Path) -> None:
    peer = Peer("library", sys.executable, script=script, modes=["hangs"], check=False, answer_within_s=0.2)
    with peer, pytest.raises(PeerError, match=r"^The peer library gave no answer within 0\.2 s"):
        peer.time("hangs", 1)


def test_one_mode_can_have_a_process_of_its_own_without_the_check(script: Path) -> None:
    with Peer("library", sys.executable, script=script, modes=["unclipped"], check=False) as peer:
        assert peer.ready.modes == {"unclipped": None}
        assert peer.ready.check == {}
        assert len(peer.time("unclipped", 1)) == 1
    assert peer.peak_rss_mb is not None


def test_a_peer_that_cannot_start_is_named(script: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"^The peer library did not start: .*no-python"):
        Peer("library", tmp_path / "no-python", script=script).start()
    with pytest.raises(PeerError, match=r"ended too early; its last words: .*invalid choice: 'misspelt'"):
        Peer("library", sys.executable, script=script, modes=["misspelt"]).start()
    script.write_text("print('hello')", encoding="utf-8")
    with pytest.raises(PeerError, match="The peer library said 'hello' instead of JSON"):
        Peer("library", sys.executable, script=script).start()


def test_clipped_mean_scales_only_what_is_longer_than_the_clip() -> None:
    gradients = [[3.0, 4.0], [0.0, 0.5]]
    assert clipping.clipped_mean(gradients, 1.0) == pytest.approx([0.3, 0.65])
    assert clipping.clipped_mean(gradients, math.inf) == pytest.approx([1.5, 2.25])
    assert clipping.half_clipping(gradients) == pytest.approx(2.75)


def test_an_environment_that_cannot_be_made_gives_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    impossible = Requirements(("covey-has-no-such-package==0",))
    with pytest.raises(PeerMissingError) as failure:
        prepare("library", requirements=impossible, cache=tmp_path)
    assert str(failure.value) == (
        "The environment of library could not be made: No matching distribution found for covey-has-no-such-package==0."
    )
    assert "peers: setting up" in capsys.readouterr().err
    assert not (tmp_path / "library" / STAMP).exists()


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    requirements = Requirements((str(_wheel(tmp_path)),))
    python = prepare("library", requirements=requirements, cache=tmp_path)
    assert list(python.parents[1].rglob("small.py"))
    left_alone = python.parent / "left-alone"
    left_alone.touch()
    assert prepare("library", requirements=requirements, cache=tmp_path) == python
    assert left_alone.exists()


def test_other_requirements_are_another_environment(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("other==1.0\n", encoding="utf-8")
    requirements = Requirements(("small==1.0",), constraints)
    before = requirements.digest()
    assert Requirements(("small==1.0",), constraints).digest() == before
    assert Requirements(("small==1.1",), constraints).digest() != before
    constraints.write_text("other==2.0\n", encoding="utf-8")
    assert requirements.digest() != before


def _wheel(folder: Path) -> Path:
    """The smallest package there is."""
    path = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("small.py", "")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    return path
