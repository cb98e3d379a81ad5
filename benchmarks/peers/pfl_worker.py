"""One worker of pfl: imported by `pfl_simulation` when the environment says which worker it is.

Importing pfl's PyTorch operations is what joins the workers, so this module cannot be imported earlier.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import simulation_job as jobs
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

PACKAGES = ("pfl", "torch", "numpy")


class ReturnUnchanged(FederatedAveraging):
    """Federated averaging whose clients do not train: their difference is zero, and is added up as any."""

    def train_one_user(self, initial_model_state: Any, model: Any, *_: object) -> tuple[Any, Metrics]:
        """No local training; all else is as in pfl's own."""
        return model.get_model_difference(initial_model_state), Metrics()


class Clock(TrainingProcessCallback):
    """When the rounds began and when each ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        self.times.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, *_: object, central_iteration: int) -> tuple[bool, Metrics]:
        """A round has ended; go on."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def run(job: jobs.Job) -> Mapping[str, object]:
    """All rounds of the job, in this worker."""
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(job.threads)
    np.random.seed(job.seed)
    module = WatchCnn() if job.mode == "real" else FlatModel(job.parameters)
    before = loss_of(module, seed=job.seed) if isinstance(module, WatchCnn) else 0.0
    # pfl insists on an evaluation before the first round, which is warm-up; it shall cost nothing.
    module.metrics = lambda *_: {"examples": Weighted(1, 1)}
    module.loss = getattr(module, "loss", None)  # pfl wants it to be there, also where nobody trains
    clock = Clock()
    _average(job, module, clock)
    if isinstance(module, WatchCnn):
        jobs.check_learned(before, loss_of(module, seed=job.seed))
    else:
        jobs.check_unchanged(module.vector.detach().numpy(), count=job.parameters)
    return {"times": clock.times, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def _average(job: jobs.Job, module: torch.nn.Module, clock: Clock) -> None:
    """Federated averaging over everybody."""
    users = _users(job)
    dataset = FederatedDataset(lambda user: users[user], get_user_sampler("minimize_reuse", list(range(job.clients))))
    rounds = job.warm_up + job.rounds
    algorithm = FederatedAveraging() if job.mode == "real" else ReturnUnchanged()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=job.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset),
        # The central optimizer adds the average difference as it is.
        model=PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=jobs.LEARNING_RATE, local_batch_size=jobs.BATCH_SIZE
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=jobs.EXAMPLES),
        callbacks=[clock],
        send_metrics_to_platform=False,  # it would print them
    )


def _users(job: jobs.Job) -> list[PyTorchTensorDataset]:
    """Everybody's data; a no-op client has as many examples, of one number."""
    nothing = (torch.zeros(jobs.EXAMPLES, 1), torch.zeros(jobs.EXAMPLES, 1))
    return [
        PyTorchTensorDataset(tensors(client, seed=job.seed) if job.mode == "real" else nothing, user_id=str(client))
        for client in range(job.clients)
    ]
