"""``covey-aggregator privacy``: how much noise a device-level budget asks for, and what a task has cost so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, get_args

import typer

from aggregator.adapters.privacy_plot import draw_plan
from aggregator.assembly import bundle_of
from aggregator.cli_options import AsJson, Config, opened
from aggregator.command_line import examples, make_group, say_json, say_table
from aggregator.device_budget import DELTA, TaskBudget
from aggregator.in_force import config_of
from aggregator.privacy.adversaries import Adversary, AdversaryName
from aggregator.privacy.planning import NoisePlan, PlanRequest, plan_noise
from fl_protocol.errors import ConfigError, LocalMisuseError

privacy_app = make_group("Device-level privacy: everything that one wearer contributes (docs/device-level-privacy.md).")
_PICTURES = (".svg", ".png")
_WHO: dict[str, str] = {
    "aggregator": "the aggregator, which sees the sums",
    "model_release": "those who see released models only",
}


@privacy_app.command(
    "plan",
    epilog=examples(
        "privacy plan --epsilon 2 --delta 1e-6 --devices 5000 --rounds 200 --participation-cap 20",
        "privacy plan --epsilon 2 --delta 1e-6 --devices 5000 --rounds 200 --adversary model_release --secret-coins",
        "privacy plan --epsilon 2 --delta 1e-6 --devices 5000 --rounds 200 --minimum-separation-rounds 10 --plot p.svg",
    ),
)
def privacy_plan(
    *,
    epsilon: Annotated[float, typer.Option(help="Of the budget, for all rounds together.")],
    delta: Annotated[float, typer.Option(help="Of the budget; well below 1 over the number of devices.")],
    devices: Annotated[int, typer.Option(help="How many there are.")],
    rounds: Annotated[int, typer.Option(help="Of the task.")],
    cohort: Annotated[
        int | None, typer.Option(help="Updates a round, the fewest that are added up. Default: a tenth of the devices.")
    ] = None,
    participation_cap: Annotated[
        int | None, typer.Option(help="Rounds that one device takes part in at most. Default: all.")
    ] = None,
    minimum_separation_rounds: Annotated[
        int, typer.Option(help="Rounds from one participation of a device to its next, at least.")
    ] = 1,
    parameters: Annotated[int, typer.Option(help="Numbers in an update. Default: of watch_cnn.")] = 8711,
    l2_norm_clip: Annotated[float, typer.Option(help="Clip of a whole update.")] = 1.0,
    colluding: Annotated[
        float, typer.Option(help="Share of each round's updates from devices that tell their noise, 0 to below 1.")
    ] = 0.0,
    adversary: Annotated[AdversaryName, typer.Option(help="Against whom.")] = "aggregator",
    secret_coins: Annotated[
        bool, typer.Option("--secret-coins", help="Devices toss secret coins; amplifies against model_release only.")
    ] = False,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw epsilon over rounds and error over cohorts: .svg or .png.")
    ] = None,
) -> None:
    """Find the least noise for a budget, and say what it does to the mean update, the modulus and the bytes."""
    if plot is not None and plot.suffix not in _PICTURES:
        raise ConfigError(f"--plot {plot}: expected a name that ends with {' or '.join(_PICTURES)}")
    try:
        request = PlanRequest(
            epsilon=epsilon,
            delta=delta,
            devices=devices,
            rounds=rounds,
            cohort=max(2, devices // 10) if cohort is None else cohort,
            adversary=Adversary(name=adversary, colluding_share=colluding, amplified=secret_coins),
            participation_cap=participation_cap,
            minimum_separation_rounds=minimum_separation_rounds,
            parameters=parameters,
            l2_norm_clip=l2_norm_clip,
        )
        found = plan_noise(request)
    except LocalMisuseError as error:
        raise ConfigError(f"no plan: {error}") from error
    if plot is not None:
        draw_plan(request, found, plot)
    if as_json:
        say_json({"request": request, "plan": found})
    else:
        _show(request, found)


@privacy_app.command(
    "spent",
    epilog=examples(
        "privacy spent exercises --config aggregator.toml", "privacy spent exercises --config aggregator.toml --json"
    ),
)
def privacy_spent(
    task: str,
    config: Config,
    as_json: AsJson = False,
    delta: Annotated[
        float | None, typer.Option(min=0, max=1, help="At which epsilon is told. Default: the budget's, or 1e-6.")
    ] = None,
) -> None:
    """What a secure task's rounds have cost any one device so far, against whom; from what the database has of them."""
    with opened(config) as (_, store):
        stored = store.tasks.get(task)
        about = config_of(stored.spec, task)
        length = about.update_length(len(bundle_of(store, stored).shared_params))
        budget = TaskBudget(store, about, update_length=length)
        section = about.device_privacy
        at = delta if delta is not None else (section.delta if section is not None else DELTA)
        spent = {name: budget.epsilon(name, delta=at) for name in get_args(AdversaryName)}
        rounds = len(budget.events())
    if as_json:
        finite = {name: epsilon if math.isfinite(epsilon) else None for name, epsilon in spent.items()}
        say_json({"task": task, "rounds": rounds, "delta": at, "epsilon": finite, "budget": section})
        return
    rows = [(_WHO[name], f"{epsilon:.4g}" if math.isfinite(epsilon) else "no bound") for name, epsilon in spent.items()]
    if section is not None:
        rows.append((f"budget, against {section.adversary}", f"{section.epsilon:g} at delta {section.delta:g}"))
    if about.secure is None:
        typer.echo(
            f"{task} has the engine open: the aggregator sees each update, and nothing is claimed at device level"
        )
        return
    say_table(f"Device-level epsilon of {task} at delta {at:g}, after {rounds} sums", ("against", "epsilon"), rows)


def _show(request: PlanRequest, found: NoisePlan) -> None:
    """Print a plan for people."""
    shared = found.device_variance > 0
    noise: list[tuple[str, object]] = (
        [("each device's Skellam variance, grid steps²", found.device_variance)]
        if shared
        else [("the aggregator's discrete Gaussian, grid steps", found.central_sigma)]
    )
    rows: list[tuple[str, object]] = [
        ("epsilon, delta", f"{found.epsilon:.4g}, {request.delta:g}"),
        ("against", _against(request)),
        ("updates a round", str(request.cohort)),
        ("rounds one device can be in", f"{found.most_participations}; on average {found.mean_participations:.4g}"),
        ("noise multiplier of the sum", found.noise_multiplier),
        *noise,
        ("grid step", found.step),
        ("modulus, bits", str(found.modulus_bits)),
        ("masked vector, bytes up", str(found.masked_bytes)),
        ("expected L2 error of the mean update", found.noise_norm),
        ("the same over the clip", found.relative_error),
        ("noise in one coordinate of the mean", found.coordinate_noise),
        ("signal to noise, a mean as long as the clip", found.signal_to_noise),
        ("the same in its own direction", found.directed_signal_to_noise),
    ]
    say_table(
        f"Noise for {request.rounds} rounds among {request.devices} devices, {request.parameters} parameters",
        ("what", "value"),
        [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in rows],
    )


def _against(request: PlanRequest) -> str:
    """The adversary in words."""
    adversary = request.adversary
    words = "the aggregator" if adversary.name == "aggregator" else "those who see released models, not the aggregator"
    if adversary.colluding_share:
        words += f", with {adversary.colluding_share:.3g} of each round's updates on its side"
    return words + ("; coins are secret" if adversary.amplified else "")
