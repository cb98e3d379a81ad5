"""What the simulators' benchmark asks for and how it reads the answer; the peers themselves are not started."""

from __future__ import annotations

import json
import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulation_peers
from benchmarks.peers import environments, simulation_job
from benchmarks.peers.client import PeerError
from benchmarks.peers.environments import REPOSITORY, PeerMissingError
from benchmarks.peers.simulation_job import CNN_PARAMETERS, SHAPES, Job, JobError, parse_job
from benchmarks.process_tree import Memory
from benchmarks.simulation_peers import Bounds, Result, make_job, medians, result_of, run_job, tuned

PEAK = Memory(rss_mb=300.0, high_water_mb=310.0, pss_mb=200.0)


def answer(times: list[float]) -> str:
    return "Ray says hello\n" + json.dumps({"times": times, "versions": {"flwr": "1.41.0"}}) + "\n"


def test_the_network_has_the_bundles_parameters_layer_by_layer() -> None:
    with zipfile.ZipFile(REPOSITORY / "models" / "bundles" / "watch_cnn.covey") as bundle:
        manifest = json.loads(bundle.read("manifest.json"))
    assert {one["name"]: tuple(one["shape"]) for one in manifest["parameters"]} == dict(SHAPES)
    assert manifest["num_parameters"] == CNN_PARAMETERS == 8711
    assert manifest["input"]["shape"] == [simulation_job.WINDOW, simulation_job.CHANNELS]
    assert len(manifest["label"]["names"]) == simulation_job.CLASSES
    assert manifest["batch_size"] == simulation_job.BATCH_SIZE
    assert simulation_job.STEPS * simulation_job.BATCH_SIZE == simulation_job.EXAMPLES


def test_everybody_who_asks_gets_the_same_windows_and_each_client_its_own() -> None:
    windows, labels = simulation_job.client_windows(3, seed=1)
    again, _ = simulation_job.client_windows(3, seed=1)
    assert (windows.shape, windows.dtype) == ((256, 128, 6), np.float32)
    assert (labels.shape, labels.dtype, set(labels.tolist())) == ((256,), np.int32, set(range(7)))
    np.testing.assert_array_equal(windows, again)
    for other in (simulation_job.client_windows(4, seed=1), simulation_job.client_windows(3, seed=2)):
        assert not np.array_equal(windows, other[0])


def test_windows_of_a_class_share_its_frequency() -> None:
    windows, labels = simulation_job.client_windows(0, seed=0)
    for label in range(simulation_job.CLASSES):
        spectrum = np.abs(np.fft.rfft(windows[labels == label].mean(axis=(0, 2))))
        assert int(spectrum.argmax()) == (label + 1) * simulation_job.WINDOW // 32


def test_a_job_survives_the_way_to_a_peer() -> None:
    job = Job("noop", clients=7, rounds=2, warm_up=3, parameters=1_000_000, workers=4, threads=2, seed=5)
    assert parse_job(job.text()) == job


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "idle"}, "The mode must be one of real, noop, not 'idle'."),
        ({"mode": "noop", "clients": 1}, "clients must be a whole number of at least 2, not 1."),
        ({"mode": "noop", "warm_up": 0}, "warm_up must be a whole number of at least 1, not 0."),
        ({"mode": "noop", "rounds": 2.5}, "rounds must be a whole number of at least 1, not 2.5."),
        ({"mode": "real", "parameters": 9}, "A real job trains 8711 parameters, not 9; leave that out."),
        ({"mode": "noop", "speed": 9}, "Expected a job as one JSON object"),
    ],
)
def test_an_impossible_job_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)):
        parse_job(json.dumps(fields))


def test_warm_up_is_left_out_and_the_median_round_decides() -> None:
    job = Job("noop", clients=100, rounds=3, warm_up=2)
    looks = [(50.0, 40.0), (60.0, 41.0), (62.0, 44.0), (64.0, 48.0)]
    result = result_of("pfl", job, answer([0.0, 50.0, 60.0, 60.5, 62.5, 63.5]), peak=PEAK, looks=looks)
    assert result == Result(100.0, 1000 * (47.0 - 41.0) / 300, (0.5, 2.0, 1.0), 200.0, 300.0, {"flwr": "1.41.0"})


def test_processor_time_of_rounds_between_two_looks_is_not_guessed() -> None:
    assert simulation_peers.spent_between([(0.0, 0.0), (2.0, 1.0), (4.0, 2.0)], 1.0, 3.0) is None
    assert simulation_peers.spent_between([], 1.0, 3.0) is None


@pytest.mark.parametrize("said", ["", "nothing of the kind", "[1]", '{"versions": {}}', answer([0.0, 1.0, 2.0])])
def test_an_answer_that_is_no_result_of_the_job_is_refused(said: str) -> None:
    with pytest.raises(PeerError, match=r"The peer pfl said .* instead of its result"):
        result_of("pfl", Job("noop", rounds=3), said, peak=PEAK)


def test_rounds_that_end_before_they_began_are_refused() -> None:
    with pytest.raises(JobError, match="must end after"):
        simulation_job.round_seconds([0.0, 2.0, 1.0], warm_up=1)
    with pytest.raises(JobError, match="too few"):
        simulation_job.round_seconds([0.0, 2.0], warm_up=1)


def test_a_peer_that_does_not_do_the_job_is_noticed() -> None:
    kept = simulation_job.flat_parameters(1000)
    simulation_job.check_unchanged(kept * np.float32(1 + 1e-6), count=1000)
    for lost in (np.zeros_like(kept), kept[:-1], kept * np.float32(1.01)):
        with pytest.raises(JobError, match="must stay as it was"):
            simulation_job.check_unchanged(lost, count=1000)
    simulation_job.check_learned(1.9, 1.8)
    for after in (1.9, math.nan):
        with pytest.raises(JobError, match="loss must fall"):
            simulation_job.check_learned(1.9, after)


def test_repeats_are_summed_up_by_their_median_rate_and_highest_memory() -> None:
    runs = [
        Result(rate, rate / 10, (1.0,), pss, 2 * pss, {"pfl": "0.6.0"})
        for rate, pss in ((3.0, 10.0), (1.0, 30.0), (2.0, 20.0))
    ]
    found = medians(runs)
    assert (found["client_rounds_per_s"], found["peak_pss_mb"], found["peak_rss_mb"]) == (2.0, 30.0, 60.0)
    assert found["cpu_ms"] == pytest.approx(0.2)
    assert medians([]) == {"runs": 0}


def test_every_peer_is_pinned_exactly_with_the_same_torch() -> None:
    torches = set()
    for peer, script in simulation_peers.PEERS.items():
        packages = environments.PEERS[peer].packages
        assert all(re.fullmatch(r"[a-z]+(\[[a-z]+\])?==[0-9.]+", package) for package in packages)
        torches |= {package for package in packages if package.startswith("torch==")}
        assert (simulation_peers.SCRIPTS / script).is_file()
    assert len(torches) == 1
    for mode in ("real", "noop", "million"):
        assert {tuned(peer, make_job(mode, 100, 2)).workers for peer in simulation_peers.PEERS} <= {1, 2, 4}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script of a peer that needs no environment: what it does is up to the test."""
    script = tmp_path / "stand_in.py"
    monkeypatch.setattr(simulation_peers, "SCRIPTS", tmp_path)
    monkeypatch.setattr(simulation_peers, "PEERS", {"stand_in": script.name})
    monkeypatch.setattr(simulation_peers, "prepare", lambda _: sys.executable)
    return script


def test_a_run_is_a_process_that_gets_the_job_and_answers(stand_in: Path) -> None:
    stand_in.write_text(
        "import json, os, sys\njob = json.loads(sys.argv[1])\n"
        "print(json.dumps({'times': [0, 1, 3], 'versions': {'threads': os.environ['OMP_NUM_THREADS']}}))\n"
    )
    result = run_job("stand_in", Job("noop", clients=10, rounds=1, threads=2))
    assert (result.client_rounds_per_s, result.versions) == (5.0, {"threads": "2"})


def test_a_run_that_fails_says_its_last_words(stand_in: Path) -> None:
    stand_in.write_text("import sys\nsys.exit('no Ray here')\n")
    with pytest.raises(PeerError, match="The peer stand_in failed with 1; its last words: no Ray here"):
        run_job("stand_in", Job("noop"))


def test_a_run_that_wants_too_much_memory_is_ended_with_its_children(stand_in: Path, tmp_path: Path) -> None:
    child = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); "
        "hog = b'x' * 200_000_000; time.sleep(600)"
    )
    stand_in.write_text(
        f"import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, {str(tmp_path / 'pid')!r}], start_new_session=True)\n"
    )
    with pytest.raises(PeerError, match=r"was ended: it held .* MB, more than the 150 MB it may"):
        run_job("stand_in", Job("noop"), bounds=Bounds(memory_mb=150.0))
    status = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    assert not status.exists() or ") Z " in status.read_text()


def test_a_peer_that_cannot_be_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise PeerMissingError("The environment of pfl could not be made: no network.")

    monkeypatch.setattr(simulation_peers, "prepare", missing)
    (record,) = simulation_peers.interleaved(["pfl"], [Job("noop")], repeats=3, bounds=Bounds())
    assert (record["runs"], record["failure"]) == (0, "The environment of pfl could not be made: no network.")
