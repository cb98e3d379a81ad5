"""The job in Apple's pfl; a script for the ``pfl`` environment.

As pfl's guide "Fast distributed simulations" has it: the same program once for each worker, told by
``PFL_WORKER_ADDRESSES`` and ``PFL_WORKER_RANK``; they add up by `torch.distributed` (gloo). With one worker there is
nothing to add up. In pfl's favour: as many workers as was found fastest, data as tensors made before the clock runs, no
evaluation but an empty one before the first round (which is warm-up), no metrics.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys

import simulation_job as jobs

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"
END_WITHIN_S = 60.0


def main() -> None:
    """The first worker starts the others and tells the result."""
    job = jobs.parse_job(sys.argv[1])
    rank = os.environ.get(RANK)
    others = start_others(job.workers) if rank is None and job.workers > 1 else []
    worker = importlib.import_module("pfl_worker")
    if rank is None:
        jobs.main(worker.run)
    else:
        worker.run(job)
    if any(other.wait(END_WITHIN_S) for other in others):
        raise SystemExit("A worker of pfl failed.")


def start_others(workers: int) -> list[subprocess.Popen[bytes]]:
    """All but the first, which this process becomes."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
    os.environ.update({ADDRESSES: addresses, RANK: "0", "GLOO_SOCKET_IFNAME": "lo"})
    command = [sys.executable, *sys.argv]
    # Only the first worker's output is the answer; each would print its own copy of what pfl says.
    return [
        subprocess.Popen(command, env=os.environ | {RANK: str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(1, workers)
    ]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


if __name__ == "__main__":
    main()
