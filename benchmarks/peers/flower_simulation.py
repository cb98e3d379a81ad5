"""The job in Flower's simulation runtime on Ray, by its message API; for the ``flower_simulation`` environment.

As Flower's PyTorch quickstart has it: a `ClientApp` whose ``train`` function gets the arrays in a `Message` and replies
with its own, and the message strategy `FedAvg`; `run_simulation` starts both. In Flower's favour: as many actors as was
found fastest (each with one processor of Ray's), evaluation is off, Ray's dashboard and both telemetries are off, every
actor makes the windows of all clients before the clock runs, and the flat model of a no-op job is one array.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Mapping

import simulation_job as jobs

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from simulation_cnn import WatchCnn, loss_of, tensors

PACKAGES = ("flwr", "ray", "torch", "numpy")


def run(job: jobs.Job) -> Mapping[str, object]:
    """All rounds of the job."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(job.threads)
    times: list[float] = []
    final: list[ArrayRecord] = []
    model = WatchCnn()
    first = ArrayRecord(model.state_dict() if job.mode == "real" else {"flat": _flat(job)})
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        def stamp(_: int, arrays: ArrayRecord) -> None:
            times.append(time.perf_counter())  # before the first round, and after each
            final[:] = [arrays]

        FedAvg(fraction_evaluate=0.0).start(grid, first, num_rounds=job.warm_up + job.rounds, evaluate_fn=stamp)

    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        run_simulation(server_app, client_app(job), job.clients, backend_config=backend(job, folder))
    _check(job, model, final[0])
    return {"times": times, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def backend(job: jobs.Job, folder: str) -> dict[str, dict[str, int | float | str | bool]]:
    """As many actors as the job has workers; Ray has a processor for each, whatever the machine has."""
    return {
        "init_args": {"num_cpus": job.workers, "_temp_dir": folder, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }


def client_app(job: jobs.Job) -> ClientApp:
    """What each client does with a message; partials of this module's functions are cheap to hand to Ray."""
    app = ClientApp()
    app.train()(functools.partial(train if job.mode == "real" else return_unchanged, job))
    return app


def return_unchanged(_: jobs.Job, message: Message, __: Context) -> Message:
    """The arrays go back as they came."""
    return _reply(message, message.content["arrays"])


def train(job: jobs.Job, message: Message, context: Context) -> Message:
    """The local steps, from the global arrays."""
    model, data = _prepared(job)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    windows, labels = data[int(context.node_config["partition-id"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=jobs.LEARNING_RATE)
    for start in range(0, jobs.STEPS * jobs.BATCH_SIZE, jobs.BATCH_SIZE):
        optimizer.zero_grad()
        model.loss(windows[start : start + jobs.BATCH_SIZE], labels[start : start + jobs.BATCH_SIZE]).backward()
        optimizer.step()
    return _reply(message, ArrayRecord(model.state_dict()))


@functools.lru_cache(maxsize=1)
def _prepared(job: jobs.Job) -> tuple[WatchCnn, list[tuple[torch.Tensor, torch.Tensor]]]:
    """An actor's model and everybody's data, made once."""
    torch.set_num_threads(job.threads)
    return WatchCnn(), [tensors(client, seed=job.seed) for client in range(job.clients)]


def _reply(message: Message, arrays: ArrayRecord) -> Message:
    """A client's answer; all weigh the same."""
    metrics = MetricRecord({"num-examples": jobs.EXAMPLES})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _flat(job: jobs.Job) -> torch.Tensor:
    return torch.from_numpy(jobs.flat_parameters(job.parameters))


def _check(job: jobs.Job, model: WatchCnn, final: ArrayRecord) -> None:
    """That the rounds did what the job says."""
    state = final.to_torch_state_dict()
    if job.mode == "noop":
        jobs.check_unchanged(state["flat"].numpy(), count=job.parameters)
        return
    before = loss_of(model, seed=job.seed)
    model.load_state_dict(state)
    jobs.check_learned(before, loss_of(model, seed=job.seed))


if __name__ == "__main__":
    import flower_simulation  # by its name: so Ray's actors import it, with its cache, and need no copy in each call

    jobs.main(flower_simulation.run)
