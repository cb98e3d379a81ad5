"""Our side of the conversation with a peer: starts its process, asks for blocks of steps, ends it."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.environments import isolated

SCRIPTS = Path(__file__).resolve().parent
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
READY_WITHIN_S = 600.0
ANSWER_WITHIN_S = 300.0
END_WITHIN_S = 10.0


class PeerError(Exception):
    """A peer died, went silent, or was asked for what it does not have; the message names it."""


@dataclass(frozen=True)
class Ready:
    """What a peer said of itself."""

    versions: dict[str, str]
    parameters: int
    modes: dict[str, str | None]
    """None, or ``unsupported: why``."""
    check: dict[str, float]
    """Relative error of a mode's noiseless gradient against naive per-example clipping (plain modes: the mean)."""
    noise: dict[str, float]
    """The noise multiplier measured in a private mode's step; 1 was set."""

    @property
    def supported(self) -> list[str]:
        """The modes that can be timed."""
        return [mode for mode, refusal in self.modes.items() if refusal is None]


class Peer:
    """One process of a peer, as a context manager; it costs no processor time between two blocks.

    Args:
        name: the peer, which is also the name of its script.
        python: the interpreter of its environment.
        modes: only these; one process for each tells their memory apart.
        check: prove the modes first. Without it the peak memory is that of the steps alone.
        script: another script than the peer's own.
        ready_within_s: how long starting, checking and compiling may take.
        answer_within_s: how long one block may take.
    """

    ready: Ready
    peak_rss_mb: float | None = None

    def __init__(
        self,
        name: str,
        python: Path | str,
        *,
        modes: Sequence[str] = (),
        check: bool = True,
        script: Path | None = None,
        ready_within_s: float = READY_WITHIN_S,
        answer_within_s: float = ANSWER_WITHIN_S,
    ) -> None:
        self.name = name
        self._command = [str(python), str(script or SCRIPTS / f"{name}_steps.py")]
        self._command += [part for mode in modes for part in ("--mode", mode)] + ([] if check else ["--unchecked"])
        self._ready_within_s = ready_within_s
        self._answer_within_s = answer_within_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def start(self) -> Ready:
        """Start the process and wait until its modes are built.

        Raises:
            PeerError: it did not get there.
        """
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - _end closes it
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=isolated() | ONE_THREAD,
            )
        except OSError as error:
            self._stderr.close()
            raise PeerError(f"The peer {self.name} did not start: {error}.") from error
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        answer = self._answer("ready", within_s=self._ready_within_s)
        self.ready = Ready(**{key: value for key, value in answer.items() if key != "ready"})
        return self.ready

    def time(self, mode: str, calls: int) -> list[float]:
        """The milliseconds of each of so many steps.

        Raises:
            PeerError: the mode is unsupported or unknown, or the process failed.
        """
        refusal = self.ready.modes.get(mode, "there is no such mode")
        if refusal is not None:
            raise PeerError(f"The peer {self.name} cannot time {mode}: {refusal}.")
        self._ask({"mode": mode, "calls": calls})
        times: list[float] = self._answer("ms", within_s=self._answer_within_s)["ms"]
        return times

    def close(self) -> float:
        """End the process and give its peak memory in MB; a second time only the number.

        Raises:
            PeerError: it did not answer.
        """
        if self.peak_rss_mb is None:
            self._ask({"quit": True})
            self.peak_rss_mb = float(self._answer("peak_rss_mb", within_s=self._answer_within_s)["peak_rss_mb"])
            self._end()
        return self.peak_rss_mb

    def __enter__(self) -> Peer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._process is not None:
            self.close()
        self._end()

    def _ask(self, request: dict[str, object]) -> None:
        """Send one line."""
        if self._process is None or self._process.stdin is None:
            raise PeerError(f"The peer {self.name} is not running.")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure("ended too early") from error

    def _answer(self, key: str, *, within_s: float) -> dict[str, Any]:
        """The next line, which must have this key."""
        try:
            line = self._answers.get(timeout=within_s)
        except queue.Empty as error:
            raise self._failure(f"gave no answer within {within_s:g} s") from error
        if not line:
            raise self._failure("ended too early")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise self._failure(f"said {line.strip()[:80]!r} instead of JSON") from error
        if not isinstance(answer, dict) or key not in answer:
            raise self._failure(f"said {line.strip()[:80]!r} without {key!r}")
        return answer

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Hand on every line, and an empty one at the end."""
        if process.stdout is not None:
            with process.stdout as lines:
                for line in lines:
                    self._answers.put(line)
        self._answers.put("")

    def _failure(self, what: str) -> PeerError:
        """The error to raise, with the last that the process said; the process is ended."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._stderr.seek(0)
        said = [line.strip() for line in self._stderr if line.strip()]
        self._end()
        return PeerError(f"The peer {self.name} {what}" + (f"; its last words: {said[-1]}" if said else "."))

    def _end(self) -> None:
        """Leave no process and no file behind."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a dead peer leaves a request that cannot be flushed
                process.stdin.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._stderr.close()
