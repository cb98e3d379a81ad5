"""What the place of the noise costs: accuracy on unseen people of local, secure and central noise at the same epsilon.

Smartwatch recordings of ten people (seglearn), five folds: two people are measured and never train. Three levels:

    record            one window of one wrist; 16 wrists, one clipped-gradient sum a round each (distributed DP-SGD)
    device_ten        all that one wrist ever sends; the same 16 wrists
    device_thousand   all that one person sends; 1,000 synthetic persons made from the 8 who train
                      (`benchmarks.synthetic_persons`), measured on the two real people who are left

and three places (`benchmarks.utility_mechanisms`):

    local     every device's own noise carries its claim alone
    secure    devices share the noise out among them; only the sum of all is seen
    central   a curator who is trusted with the exact sum adds it

Training, noise, grid, accounting and optimiser are the code that runs on devices and at the aggregator; masks and
transport are left out. Settings are chosen in each fold by training on some of its training people and measuring on the
others: once for `local`, once for `central`; `secure` takes what was chosen for `central`. The draws are seeded.

    central_minus_secure_points          the largest of all levels and epsilons (asked: at most 2)
    central_minus_secure_points_by_row   of each: mean over folds and repetitions, paired, with its standard error

    python -m benchmarks.privacy_utility --json --plot docs/images/privacy-utility.png   # 35 minutes of processor time
    python -m benchmarks.privacy_utility --levels record --epsilons 3                    # a quick look
    python -m benchmarks.privacy_utility --kept trainings.jsonl                          # goes on where it stopped
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.command import parser
from benchmarks.feature_head import shortcut_error
from benchmarks.utility_report import ARMS, Found, as_text, plot, reported
from benchmarks.utility_training import LEVELS, SAMPLES, Job, LevelName, Outcome, run_job
from benchmarks.utility_tuning import FOLDS, Candidates, candidates, chosen, tuning_jobs
from firmware_sim.watch_data import all_wrists, default_cache, load_recordings, windows_of

EPSILONS = (1.0, 3.0, 8.0)
REPETITIONS: dict[LevelName, int] = {"record": 15, "device_ten": 140, "device_thousand": 4}
LARGEST_ERROR = 1e-5
Run = Callable[[list[Job]], dict[Job, Outcome]]


def main() -> None:
    arguments = _arguments()
    error = checked_shortcut()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the processes that are started: matrices here are small
    with ExitStack() as stack:
        kept = stack.enter_context(arguments.kept.open("a+")) if arguments.kept else None
        pool = stack.enter_context(get_context("spawn").Pool(arguments.processes))
        run = KeptRuns(lambda jobs: pool.imap(run_job, jobs), kept)
        repetitions = {level: arguments.repetitions or REPETITIONS[level] for level in LEVELS}
        report = measure(
            levels=tuple(arguments.levels), epsilons=tuple(arguments.epsilons), repetitions=repetitions, run=run
        )
    report["largest_error_of_kept_features"] = error
    print(json.dumps(report, indent=1) if arguments.json else as_text(report))
    if arguments.plot is not None:
        plot(report, arguments.plot)


def measure(
    *,
    levels: tuple[LevelName, ...],
    epsilons: tuple[float, ...],
    repetitions: dict[LevelName, int],
    run: Run,
    tried: Candidates = candidates,
) -> dict[str, Any]:
    """Choose settings, train with them, and report.

    Args:
        levels: some of `LEVELS`.
        epsilons: budgets.
        repetitions: trainings in each fold, of each level.
        run: trains.
        tried: candidates for the settings of a level, an epsilon and an arm.
    """
    outcomes = run([job for level in levels for epsilon in epsilons for job in tuning_jobs(level, epsilon, tried)])
    best = {
        (level, epsilon, arm, fold): chosen(outcomes, (level, epsilon, arm), fold, tried)
        for level in levels
        for epsilon in epsilons
        for arm in ARMS
        for fold in FOLDS
    }
    jobs = {
        (*key, repetition): Job(key[0], key[2], key[1], best[key], key[3], f"repetition {repetition}")
        for key in best
        for repetition in range(repetitions[key[0]])
    }
    # What the settings of the largest budget reach without noise: once in each fold, for there is no chance in it.
    largest = max(epsilons)
    noiseless = {
        (level, fold): Job(level, None, 0.0, best[level, largest, "central", fold], fold, "without noise")
        for level in levels
        for fold in FOLDS
    }
    outcomes = run([*jobs.values(), *noiseless.values()])
    found = Found(
        {key: (job, outcomes[job]) for key, job in jobs.items()},
        {key: outcomes[job] for key, job in noiseless.items()},
    )
    return reported(found, levels=levels, epsilons=epsilons)


def checked_shortcut() -> float:
    """How far training on kept features is from training the committed graph, of all wrists; stops if it is far."""
    recordings, random = load_recordings(default_cache()), np.random.default_rng(0)
    error = max(
        shortcut_error(windows_of(recordings, wrist, samples=SAMPLES), clip=clip, random=random)
        for wrist in all_wrists()
        for clip in (0.1, 100.0)
    )
    if error > LARGEST_ERROR:
        raise SystemExit(f"the head on kept features differs from the committed graph by {error:.2g}")
    return error


class KeptRuns:
    """Runs trainings that were not run before, and keeps a line for each, so that a run can go on where it stopped.

    Args:
        train: outcomes of jobs, in their order.
        file: of an earlier run, to be read and appended to; None keeps nothing.
    """

    def __init__(self, train: Callable[[list[Job]], Iterable[Outcome]], file: Any = None) -> None:
        self._train, self._file = train, file
        self._known: dict[Job, Outcome] = {}
        if file is not None:
            file.seek(0)
            *lines, _ = file.read().split("\n")
            file.truncate(sum(len(line) + 1 for line in lines))  # a run may have been killed while it wrote
            self._known = dict(msgspec.json.decode(line, type=tuple[Job, Outcome]) for line in lines)

    def __call__(self, jobs: list[Job]) -> dict[Job, Outcome]:
        """The outcome of each."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self._known]
        for job, outcome in zip(missing, _with_progress(self._train(missing), len(missing)), strict=True):
            self._known[job] = outcome
            if self._file is not None:
                self._file.write(msgspec.json.encode((job, outcome)).decode() + "\n")
                self._file.flush()
        return {job: self._known[job] for job in jobs}


def _with_progress(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """A line on standard error now and then."""
    for done, outcome in enumerate(outcomes, 1):
        if done == total or done % max(1, total // 20) == 0:
            print(f"{done}/{total} trainings", file=sys.stderr, flush=True)
        yield outcome


def _arguments() -> argparse.Namespace:
    command = parser("privacy_utility", __doc__)
    command.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    command.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS)
    command.add_argument("--repetitions", type=int, help="trainings in each fold (by default 15, 140 and 4)")
    command.add_argument("--processes", type=int, default=2, help="trainings at a time")
    command.add_argument("--kept", type=Path, metavar="FILE", help="where finished trainings are kept, and looked up")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (needs matplotlib)")
    return command.parse_args()


if __name__ == "__main__":
    main()
