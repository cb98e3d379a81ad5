"""How the commands give orders to the coordinator and tell what came of them."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from aggregator.audit.log import local_actor
from aggregator.cli_options import opened
from aggregator.command_line import say_json
from aggregator.errors import AggregatorError
from aggregator.operator_orders import give_order
from aggregator.store.tasks import OrderName


def order(config: Path, task: str, name: OrderName, *, done: str, argument: str = "", as_json: bool = False) -> None:
    """Give an order, wait for the answer, and print it.

    Args:
        config: path of aggregator.toml.
        task: that it is for.
        name: of the order.
        done: what to say when it was carried out.
        argument: of the order.
        as_json: print JSON.

    Raises:
        AggregatorError: the coordinator refused it.
    """
    with opened(config) as (_, store):
        answer = give_order(
            store,
            task,
            name,
            argument=argument,
            actor=local_actor(),
            now_s=time.time,
            monotonic_s=time.monotonic,
            sleep=time.sleep,
        )
    if as_json:
        say_json(answer)
    elif answer.state != "refused":
        typer.echo(done if answer.state == "done" else f"{task}: {answer.reason}")
    if answer.state == "refused":
        raise AggregatorError(f"{task}: {answer.reason}")
