"""The server's half: Flower's FedAvg over the devices' parameters, training only, as covey's rounds are."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
STEP = ("learning-rate", "l2-norm-clip", "noise-multiplier", "expected-batch-size")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.load(str(config["params"]))]),
        num_rounds=int(config["num-rounds"]),
        train_config=ConfigRecord({key: float(config[key]) for key in STEP}),
    )
