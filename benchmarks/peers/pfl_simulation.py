"""The job in Apple's pfl; a script for the ``pfl`` environment.

As pfl's guide "Fast distributed simulations" has it: the same program once for each worker, told by ``PFL_WORKER_ADDRESSES``
and ``PFL_WORKER_RANK``; they add up by `torch.distributed` (gloo). In pfl's favour: as many workers as was found fastest,
data as tensors made before the clock runs, no evaluation but before the first round (which is warm-up), no metrics.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import simulation_job as jobs

PACKAGES = ("pfl", "torch", "numpy")
RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"


def main() -> None:
    """The first worker starts the others and tells the result."""
    job = jobs.parse_job(sys.argv[1])
    others: list[subprocess.Popen[bytes]] = []
    if RANK not in os.environ and job.workers > 1:
        addresses = ",".join(f"127.0.0.1:{port}" for port in _free_ports(job.workers))
        os.environ |= {ADDRESSES: addresses, RANK: "0", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(1, job.workers):
            others.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {RANK: str(rank)}))
    rank = os.environ.get(RANK, "0")
    if rank == "0":
        jobs.main(run)
    else:
        run(job)
    if any(worker.wait(60) for worker in others):
        raise SystemExit("a worker of pfl failed")


def run(job: jobs.Job) -> Mapping[str, object]:
    """All rounds of the job, in this worker."""
    # Only here: importing pfl's PyTorch operations is what joins the workers.
    import numpy as np
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from simulation_cnn import FlatModel, WatchCnn, loss_of, tensors

    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(job.threads)
    np.random.seed(job.seed)
    real = job.mode == "real"
    module = WatchCnn() if real else FlatModel(job.parameters)
    before = loss_of(module, seed=job.seed) if isinstance(module, WatchCnn) else 0.0
    if not real:
        module.loss = None  # pfl wants it to be there
    module.metrics = lambda *_: {"examples": Weighted(1, 1)}  # asked for once, before the first round
    nothing = (torch.zeros(jobs.EXAMPLES, 1), torch.zeros(jobs.EXAMPLES, 1))
    users = [
        PyTorchTensorDataset(tensors(client, seed=job.seed) if real else nothing, user_id=str(client))
        for client in range(job.clients)
    ]
    times: list[float] = []

    class ReturnUnchanged(FederatedAveraging):  # type: ignore[misc, type-arg]
        """Federated averaging whose clients do not train: their difference is zero, and is added up as any."""

        def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
            return model.get_model_difference(initial_model_state), Metrics()

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        """When the rounds began and when each ended."""

        def on_train_begin(self, *, model):  # type: ignore[no-untyped-def]
            times.append(time.perf_counter())
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
            times.append(time.perf_counter())
            return False, Metrics()

    rounds = job.warm_up + job.rounds
    dataset = FederatedDataset(lambda user: users[user], get_user_sampler("minimize_reuse", list(range(job.clients))))
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    (FederatedAveraging() if real else ReturnUnchanged()).run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=job.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=jobs.LEARNING_RATE, local_batch_size=jobs.BATCH_SIZE
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=jobs.EXAMPLES),
        callbacks=[Clock()],
    )
    if isinstance(module, WatchCnn):
        jobs.check_learned(before, loss_of(module, seed=job.seed))
    else:
        jobs.check_unchanged(module.vector.detach().numpy(), count=job.parameters)
    return {"times": times, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


if __name__ == "__main__":
    main()
