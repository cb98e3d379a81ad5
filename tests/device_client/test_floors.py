"""The wearer's floors: refused by name, on the right side of each bound, and nothing is fetched for what is refused."""

from __future__ import annotations

import pytest

from device_client.floors import Floors, FloorsError
from fl_protocol.messages import RoundManifestMsg
from tests.device_client.ports import make_manifest, make_plan
from tests.device_client.session_driver import Driver, asked_for, notes

FLOORS = Floors(minimum_noise_multiplier=2.0, minimum_cohort=3, maximum_l2_norm_clip=1.5, maximum_local_steps=5)


def asking(*, noise: float = 2.0, cohort: int = 3, clip: float = 1.5, steps: int = 5) -> RoundManifestMsg:
    plan = make_plan(noise_multiplier=noise, l2_norm_clip=clip, local_steps=steps)
    return make_manifest(plan=plan, minimum_cohort=cohort, goal=100)


@pytest.mark.parametrize(
    "manifest", [asking(), asking(noise=9.0), asking(cohort=100), asking(clip=0.01), asking(steps=1)]
)
def test_what_is_at_least_as_private_as_the_floors_is_accepted(manifest: RoundManifestMsg) -> None:
    FLOORS.check(manifest)


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        (asking(noise=1.999), "noise_multiplier 1.999 is below the wearer's floor 2"),
        (asking(noise=0.0), "noise_multiplier 0 is below the wearer's floor 2"),
        (asking(cohort=2), "minimum_cohort 2 is below the wearer's floor 3"),
        (asking(cohort=1), "minimum_cohort 1 is below the wearer's floor 3"),
        (asking(clip=1.501), "l2_norm_clip 1.501 is above the wearer's limit 1.5"),
        (asking(clip=1e300), "l2_norm_clip 1e\\+300 is above the wearer's limit 1.5"),
        (asking(steps=6), "local_steps 6 is above the wearer's limit 5"),
    ],
)
def test_what_is_less_private_is_refused_by_name(manifest: RoundManifestMsg, named: str) -> None:
    with pytest.raises(FloorsError, match=named):
        FLOORS.check(manifest)


def test_without_floors_everything_a_manifest_can_say_is_accepted() -> None:
    Floors().check(asking(noise=0.0, cohort=1, clip=1e300, steps=10_000))


def fetched_below_a_floor() -> list[int]:
    """Show a device each manifest that one floor forbids; the rounds for which it asked for a model nevertheless."""
    fetched = []
    below: list[dict[str, object]] = [
        {"plan": make_plan(noise_multiplier=1.0)},
        {"minimum_cohort": 2},
        {"plan": make_plan(l2_norm_clip=2.0)},
        {"plan": make_plan(local_steps=6)},
    ]
    for number, changes in enumerate(below, start=1):
        driver = Driver(floors=FLOORS)
        actions = driver.open_round(round=number, **{"minimum_cohort": 3, **changes}) + driver.send_model()
        fetched += [number] if asked_for(actions) else []
        if not asked_for(actions):
            assert notes(actions)[0] == "message_refused"
            assert "the wearer's" in driver.session.view().refused
    return fetched


def test_nothing_is_fetched_below_a_floor() -> None:
    assert fetched_below_a_floor() == []


@pytest.mark.parametrize(
    ("blind_to", "round_number"),
    [
        ({"minimum_noise_multiplier": 0.0}, 1),
        ({"minimum_cohort": 1}, 2),
        ({"maximum_l2_norm_clip": 1e9}, 3),
        ({"maximum_local_steps": 1e9}, 4),
    ],
)
def test_a_device_that_ignores_one_floor_is_caught(
    blind_to: dict[str, float], round_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Floors.check

    def broken(self: Floors, manifest: RoundManifestMsg) -> None:
        check(Floors(**{**vars(self), **blind_to}), manifest)

    monkeypatch.setattr(Floors, "check", broken)
    assert fetched_below_a_floor() == [round_number]
