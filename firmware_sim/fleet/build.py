"""From a scenario to hub and shards. What is made here follows from the scenario alone, in whichever process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from msgspec.structs import replace as with_fields

from aggregator.store.blobs import Blobs
from aggregator.task_file import write_task
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.training import Records
from firmware_sim.attackers.kinds import LabelFlip
from firmware_sim.attackers.mislabelling import Mislabelling
from firmware_sim.attackers.plan import AttackPlan
from firmware_sim.faults.plan import FaultPlan
from firmware_sim.fleet.device_firmware import FirmwarePlan
from firmware_sim.fleet.hardware_terms import HardwareTerms
from firmware_sim.fleet.hardware_world import HardwareWorld
from firmware_sim.fleet.hub import Hub, HubSettings
from firmware_sim.fleet.maker import DeviceMaker
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.services import ServicePlan
from firmware_sim.fleet.shard import Shard
from firmware_sim.fleet.surroundings import IdealWorld, World
from firmware_sim.profiles.population import Population
from firmware_sim.remembering_key import RememberingKey
from firmware_sim.scenario.loading import TASK, LoadedScenario, load_scenario
from firmware_sim.scenario.schema import Scenario
from firmware_sim.sensors.assembly import make_sensor
from firmware_sim.sensors.diary import DAY_S
from firmware_sim.unsealed_wire import NoVerifier
from firmware_sim.virtual_device import VirtualClock
from firmware_sim.wearer.habits import Habits
from firmware_sim.wearer.situation import Wearing
from firmware_sim.wearer.trace_files import load_traces
from firmware_sim.wearer.traces import TracedWearer
from firmware_sim.wearer.wearer import Wearer
from fl_protocol.adapters.config_files import relative_to_config
from fl_protocol.adapters.journal import Journal
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.helper_config import HelperPin
from fl_protocol.signing import public_key_hex

TENANT = "fleet"


class ShardBuilder:
    """Makes a shard, in the process that simulates it, and again each time that the run was put down.

    What its devices have in common is made once: only records last from one shard to the next.

    Args:
        scenario: path of its file, as the run's folder keeps it.
        number: of the shard, from 0.
        count: of shards.
        traced: name of a device of which every event is told.
    """

    def __init__(self, scenario: Path, number: int, count: int, *, traced: str = "") -> None:
        self._scenario, self._number, self._count, self._traced = scenario, number, count, traced

    def build(self, records: Sequence[DeviceRecord] | None, *, starts_s: float) -> Shard:
        """A shard.

        Args:
            records: the devices of a run that goes on; None: they are new.
            starts_s: where the run goes on.

        Raises:
            ConfigError, BundleError: the scenario cannot be used.
        """
        if records is None:
            records = new_records(self._loaded, self._number, self._count)
        return Shard(records, maker=self._maker, world=self._world, starts_s=starts_s, traced=self._traced)

    @cached_property
    def _loaded(self) -> LoadedScenario:
        return load_scenario(self._scenario)

    @cached_property
    def _maker(self) -> DeviceMaker:
        return device_maker(self._loaded)

    @cached_property
    def _world(self) -> World:
        return world_of(self._loaded)


def hub_settings(loaded: LoadedScenario) -> HubSettings:
    """The hub of a scenario."""
    scenario = loaded.scenario
    return HubSettings(
        seed=str(scenario.seed),
        tenant=TENANT,
        began_s=scenario.began_s,
        helpers=tuple(f"helper-{chr(ord('a') + index)}" for index in range(scenario.helpers)),
        minimum_cohort=max(2, loaded.task.minimum_cohort),
        is_sealed=scenario.wire == "on",
    )


def build_hub(
    loaded: LoadedScenario,
    folder: Path,
    *,
    clock: VirtualClock,
    blobs: Blobs,
    journal: Journal,
    resumed: bool = False,
) -> Hub:
    """A hub with its task, not started yet.

    Args:
        loaded: the scenario.
        folder: for databases.
        clock: virtual time, which the hub sets.
        blobs: the aggregator's.
        journal: the aggregator's.
        resumed: whether the databases are there already.

    Raises:
        ConfigError, BundleError: the task cannot be created.
    """
    hub = Hub(folder, hub_settings(loaded), blobs, journal, clock)
    if resumed:
        return hub
    path = folder / "task.toml"
    given = with_fields(loaded.task, bundle=str(loaded.bundle_path.resolve()), publisher_key=loaded.publisher_key)
    path.write_text(write_task(given), encoding="utf-8")
    hub.create_task(path)
    return hub


def new_records(loaded: LoadedScenario, number: int, count: int) -> tuple[DeviceRecord, ...]:
    """The devices of one shard of so many, dealt out in turn, as they come from the shop."""
    indices = range(number, loaded.scenario.devices, count)
    population = Population(loaded.profiles, seed=loaded.scenario.seed) if loaded.profiles else None
    began_s = loaded.scenario.began_s
    return tuple(
        DeviceRecord(
            index=index,
            name=device_name(index),
            profile="ideal" if population is None else population.profile(index).name,
            struck_until_s=began_s,
        )
        for index in indices
    )


def fault_plan(loaded: LoadedScenario) -> FaultPlan:
    """What befalls a scenario's fleet."""
    scenario = loaded.scenario
    return FaultPlan(loaded.faults, seed=scenario.seed, began_s=scenario.began_s, ends_s=scenario.ends_s)


def service_plan(loaded: LoadedScenario) -> ServicePlan:
    """When a scenario's broker and aggregator are away."""
    scenario, schedule = loaded.scenario, fault_plan(loaded).service_faults()
    return ServicePlan(schedule, began_s=scenario.began_s, ends_s=scenario.ends_s, every_s=scenario.exchange_s)


def world_of(loaded: LoadedScenario) -> World:
    """What the devices of a scenario are in."""
    scenario = loaded.scenario
    if not loaded.profiles:
        return IdealWorld(scenario.began_s)
    plan, ends_s, hours = fault_plan(loaded), scenario.ends_s, scenario.population.job_period_hours
    terms = HardwareTerms(
        seed=str(scenario.seed),
        began_s=scenario.began_s,
        ends_s=ends_s,
        eligibility=scenario.eligibility,
        tenant=TENANT,
        faults=plan,
        job_period_s=None if hours is None else hours * 3600.0,
        firmware=_firmware_of(scenario),
    )
    profiles = {name: profile for name, (profile, _) in loaded.profiles.items()}
    return HardwareWorld(terms, profile_of=lambda record: profiles[record.profile], wearer_of=_wearers_of(loaded, plan))


def _firmware_of(scenario: Scenario) -> FirmwarePlan | None:
    """What runs on the devices, where a scenario updates it."""
    table = scenario.rollout
    if table is None:
        return None
    return FirmwarePlan(table.terms, table.rollout, seed=str(scenario.seed), ends_s=scenario.duration_s)


def _wearers_of(loaded: LoadedScenario, plan: FaultPlan) -> Callable[[DeviceRecord], Wearing]:
    """Who carries a device."""
    scenario = loaded.scenario
    if scenario.population.traces is not None:
        traces = list(load_traces(relative_to_config(loaded.path, scenario.population.traces)).values())
        return lambda record: TracedWearer(traces[record.index % len(traces)])
    habits: Habits = scenario.wearers
    wearers: dict[int, Wearer] = {}  # kept: a day that was drawn is looked at by several starts
    if plan.utc_offset_s is not None:
        habits = with_fields(habits, time_zones=((plan.utc_offset_s / 3600.0, 1.0),))

    def wearer_of(record: DeviceRecord) -> Wearer:
        found = wearers.get(record.index)
        if found is None:
            found = wearers[record.index] = Wearer(scenario.seed, record.index, habits)
        return found

    return wearer_of


def device_name(index: int) -> str:
    """What a device is called on the wire."""
    return f"device-{index:07d}"


def index_of(name: str) -> int:
    """The device that is called so."""
    return int(name.rpartition("-")[2])


def device_maker(loaded: LoadedScenario) -> DeviceMaker:
    """What the devices of a scenario have in common."""
    scenario, settings = loaded.scenario, hub_settings(loaded)
    return DeviceMaker(
        seed=str(scenario.seed),
        config=_config_of(loaded),
        bundle=loaded.bundle,
        graph=TfliteGraph.of_bundle(loaded.bundle) if scenario.fidelity == "real" else None,
        records=_records_of(loaded),
        aggregator_key=(
            RememberingKey(settings.key_of("aggregator").public_key()) if settings.is_sealed else NoVerifier()
        ),
        is_sealed=settings.is_sealed,
        began_s=scenario.began_s,
        attacks=attack_plan_of(loaded),
    )


def attack_plan_of(loaded: LoadedScenario) -> AttackPlan:
    """Which devices of a scenario are hostile."""
    return AttackPlan(loaded.attackers, seed=loaded.scenario.seed)


def _records_of(loaded: LoadedScenario) -> Callable[[int, float, float], Records] | None:
    """What a device's wearer records between two times of the run; None where nobody does."""
    scenario = loaded.scenario
    if scenario.sensors.kind == "none" or scenario.fidelity != "real":
        return None
    sensor = make_sensor(scenario.sensors, loaded.bundle.manifest, scenario.seed)
    plan = attack_plan_of(loaded)
    # A sensor's time begins at a midnight, before which nothing was recorded.
    before_s = round(scenario.history_days) * DAY_S + scenario.began_s % DAY_S
    if any(isinstance(one, LabelFlip) for one in loaded.attackers):

        def flips_of(index: int) -> tuple[LabelFlip, ...]:
            attacks = plan.attacks_of(index, device_name(index))
            return tuple(one.attacker for one in attacks if isinstance(one.attacker, LabelFlip))

        sensor = Mislabelling(sensor, len(loaded.bundle.manifest.label.names), flips_of, before_s)
    return lambda index, from_s, to_s: sensor.records(index, max(0.0, from_s + before_s), to_s + before_s)


def _config_of(loaded: LoadedScenario) -> Callable[[str], DeviceConfig]:
    """A device's configuration, given its name on the wire; nothing else differs."""
    scenario, privacy = loaded.scenario, loaded.scenario.privacy
    study = StudyConfig(
        tenant=TENANT,
        task=TASK,
        broker=BrokerConfig("virtual", 1),
        bundle="virtual",
        publisher_key="virtual",
        aggregator_key="virtual",
        tells_why_every_minutes=0,  # nobody watches a simulated fleet by its presence; the report has the reasons
        helpers=tuple(
            HelperPin(name=one.name, operator=one.operator, key=public_key_hex(one.key))
            for one in hub_settings(loaded).pinned_helpers().values()
        ),
    )
    common = DeviceConfig(
        studies=(study,),
        device=DeviceSection(store="virtual", store_key="virtual"),
        privacy=PrivacyConfig(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            period_days=privacy.period_days,
            minimum_noise_multiplier=privacy.minimum_noise_multiplier,
            minimum_cohort=privacy.minimum_cohort,
        ),
        eligibility=scenario.eligibility,
        records=RecordsConfig(held_out_fraction=0.0),
    )
    return lambda name: with_fields(common, studies=(with_fields(study, id=name),))
