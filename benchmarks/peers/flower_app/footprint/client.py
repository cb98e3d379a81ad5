"""The device's half, in Flower's Message API: train once from the parameters that came, and send back where it led.

The graph and the records are files on the device, named in the SuperNode's ``--node-config``, as covey's are.
"""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from footprint.step import take_step

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local round."""
    params = message.content["arrays"].to_numpy_ndarrays()[0]
    with np.load(str(context.node_config["records"])) as records:
        x, y = records["x"], records["y"]
    stepped = take_step(str(context.node_config["graph"]), params, x, y, message.content["config"])
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord([stepped]), "metrics": metrics}), reply_to=message)
