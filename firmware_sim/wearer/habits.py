"""What the wearers of a fleet have in common: when they sleep, how they treat the charger, when they leave home.

Chronotype, the middle of sleep on free days corrected for sleep debt (MSFsc), is near-normally distributed (T.
Roenneberg et al., "Epidemiology of the human circadian clock", Sleep Medicine Reviews 11, 2007). The average of the
database of the Munich ChronoType Questionnaire sleeps from 0:15 to 8:15, so its MSFsc is 4:15; its most frequent half
hour holds 14.6 %, the density of a normal distribution with a standard deviation of 0.146 / 0.5 h = 1 / (1.37 h √(2π)).
On work days sleep is earlier ("social jetlag", M. Wittmann et al., Chronobiology International 23, 2006), the more so
the later the chronotype.

Everything without a source is estimated, or fitted to published availability (docs/simulation-hardware.md), and says
so.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from firmware_sim.wearer.situation import Season

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Hours = Annotated[float, msgspec.Meta(ge=0, le=12)]


class Habits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of a fleet's wearers; each wearer's own are drawn from these.

    Args:
        midsleep_hour, midsleep_sd_hour: chronotype (MSFsc), local hour of the day. 4.25 and 1.37: see the module.
        sleep_hour, sleep_sd_hour: length of sleep on free days. 8.0 from 0:15-8:15; spread estimated.
        work_sleep_loss_hour: how much shorter sleep is before a work day (estimated).
        social_jetlag_hour: how much earlier the middle of sleep is then, of the average chronotype (estimated from
            Wittmann et al.: most people have at least an hour).
        social_jetlag_slope: hours of social jetlag added per hour of later chronotype (estimated).
        night_sd_hour: spread of going to bed and of rising from day to day (estimated).
        forgets_charger: probability that the device is not put on the charger for the night (fitted).
        charges_by_day: probability of a charge in the course of the day (fitted).
        day_charge_hour: its length on average (fitted).
        put_down_to_charge: probability that the device is unused all through such a charge (estimated).
        docked: share of devices that stay at home on their charger and are used there (fitted); docked_idle: share of
            waking time in which such a one is idle (estimated).
        idle_by_day: share of waking time in which the device is unused long enough to be called idle (estimated;
            Android's job scheduler wants about half an hour without use).
        works_away: share of the wearers who are without a Wi-Fi they know on work days (estimated; a workplace with
            its Wi-Fi counts as home).
        workday_hour: how long they are away.
        outing: probability of leaving home on a free day; outing_hour: for how long on average (estimated).
        ward: patients of a ward: always there, the device always on its charger.
        season: winter takes from batteries out of doors what their profile says.
        time_zones: (offset from UTC in hours, weight). One pair puts all wearers into one zone.
    """

    midsleep_hour: Annotated[float, msgspec.Meta(ge=0, le=12)] = 4.25
    midsleep_sd_hour: Annotated[float, msgspec.Meta(ge=0, le=3)] = 1.37
    sleep_hour: Annotated[float, msgspec.Meta(ge=4, le=12)] = 8.0
    sleep_sd_hour: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.8
    work_sleep_loss_hour: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.7
    social_jetlag_hour: Hours = 1.0
    social_jetlag_slope: Share = 0.5
    night_sd_hour: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.5
    forgets_charger: Share = 0.4
    charges_by_day: Share = 0.8
    day_charge_hour: Hours = 2.5
    put_down_to_charge: Share = 0.7
    docked: Share = 0.16
    docked_idle: Annotated[float, msgspec.Meta(ge=0, le=0.95)] = 0.7
    idle_by_day: Annotated[float, msgspec.Meta(ge=0, le=0.95)] = 0.35
    works_away: Share = 0.4
    workday_hour: Hours = 9.0
    outing: Share = 0.6
    outing_hour: Hours = 3.0
    ward: bool = False
    season: Season = "mild"
    time_zones: Annotated[
        tuple[tuple[Annotated[float, msgspec.Meta(ge=-12, le=14)], Annotated[float, msgspec.Meta(gt=0)]], ...],
        msgspec.Meta(min_length=1),
    ] = ((0.0, 1.0),)

    def __post_init__(self) -> None:
        # msgspec checks only what it decodes; a caller's own arguments go through the same door.
        wrong = [name for name in self.__struct_fields__ if not _possible(name, getattr(self, name))]
        if wrong:
            raise ValueError(f"habits: outside its range: {', '.join(f'{n} = {getattr(self, n)!r}' for n in wrong)}")


def _possible(name: str, value: object) -> bool:
    """Whether a field's type allows a value."""
    try:
        msgspec.convert(value, _TYPES[name])
    except msgspec.ValidationError:
        return False
    return True


_TYPES = {field.name: field.type for field in msgspec.structs.fields(Habits)}
UNITED_STATES = ((-5.0, 0.47), (-6.0, 0.29), (-7.0, 0.07), (-8.0, 0.17))
"""`Habits.time_zones` of a fleet spread over the contiguous United States, by rounded shares of its population
(estimated from census figures by state; standard time)."""
