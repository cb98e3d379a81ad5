"""Whole studies of real devices and a real aggregator, over simulated radios: slow, lossy, and cut off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.rounds import Phase
from device_client.device_ports import Connection
from firmware_sim.faults.kinds import Packets, Partition, SlowLoris
from firmware_sim.faults.packets import FaultyTransport
from firmware_sim.faults.plan import FaultPlan, FaultSchedule
from firmware_sim.faults.trickling_edge import TricklingEdge
from firmware_sim.labelled_chance import key_of
from firmware_sim.radio.broker_edge import BrokerEdge
from firmware_sim.radio.links import LinkModel
from firmware_sim.radio.radio import Radio
from firmware_sim.radio.transport import RadioTransport
from fl_protocol.transport import Transport
from tests.virtual_fleet import TENANT, VirtualFleet, task_config

BEGAN_S = 1_000_000.0
SLOW_WIFI = LinkModel(
    kind="wifi", up_bytes_per_s=20_000, down_bytes_per_s=50_000, latency_s=0.05, jitter_s=0.05, loss=0.05,
    joules_per_byte_up=2.3e-6, joules_per_byte_down=1.1e-6, tail_joules=0.028, tail_s=0.24,
)  # fmt: skip


class RadioFleet(VirtualFleet):
    """A fleet whose devices reach the broker over radios, and suffer from a plan's faults."""

    def __init__(self, folder: Path, plan: FaultPlan, **options: Any) -> None:
        self._plan = plan
        self._edge: BrokerEdge | None = None
        self.radios: dict[str, RadioTransport] = {}
        super().__init__(folder, **options)

    def schedule(self, device: str) -> FaultSchedule:
        return self._plan.faults_of(device, "watch")

    def _connect(self, wanted: Connection, seed: str) -> Transport:
        if self._edge is None:
            self._edge = BrokerEdge(self.broker, now_s=self.clock.now_s)
        schedule = self.schedule(wanted.device)
        radio = Radio(
            {"home": SLOW_WIFI},
            place=lambda _: "home",
            next_place_change_s=lambda _: float("inf"),
            outages=schedule.outages(),
            seed=self.seed,
            device=wanted.device,
        )
        edge = TricklingEdge(self._edge, gap_s=schedule.upload_gap_s, upload_prefix=f"fl/v1/{TENANT}/up/")
        transport = RadioTransport(radio, edge, now_s=self.clock.now_s, will=(wanted.will_topic, wanted.will_payload))
        self.radios[wanted.device] = transport

        def rates(*, up: bool) -> Callable[[], Any]:
            return lambda: schedule.packet_rates(self.clock.now_s(), up=up)

        return FaultyTransport(transport, up=rates(up=True), down=rates(up=False), key=key_of(seed))

    def steps(self, count: int) -> Iterator[None]:
        for _ in super().steps(count):
            if self._edge is not None:
                self._edge.advance()
            yield


def _study(folder: Path, *faults: Any) -> RadioFleet:
    folder.mkdir()
    plan = FaultPlan(faults, seed="fleet", began_s=BEGAN_S, ends_s=BEGAN_S + 86_400)
    fleet = RadioFleet(folder, plan, task=task_config(rounds=2, round_duration_s=120.0))
    fleet.run(most_s=1_200.0)
    assert fleet.state.phase is Phase.FINISHED
    return fleet


PARTITION = Partition(at_s=0, for_s=90, target=0.5)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param((), id="slow and lossy"),
        pytest.param((PARTITION,), id="partition"),
        pytest.param((Packets(at_s=0, for_s=3_600, drop=0.2, repeat=0.2, reorder=0.2, corrupt=0.05),), id="packets"),
        pytest.param((SlowLoris(at_s=0, for_s=3_600, gap_s=3.0, target=("watch-1",)),), id="slow loris"),
    ],
)
def test_a_study_gets_through_a_bad_network(tmp_path: Path, faults: tuple[Any, ...]) -> None:
    fleet = _study(tmp_path / "study", *faults)
    assert fleet.state.version == 3
    used = [radio.use for radio in fleet.radios.values()]
    assert all(use.joules > 0 and use.up_bytes > 1_793 for use in used)


def test_the_same_seed_gives_the_same_model_and_the_same_traffic(tmp_path: Path) -> None:
    runs = [_study(tmp_path / name, PARTITION) for name in ("one", "two")]
    assert len({run.model().digest for run in runs}) == 1
    # HPKE draws its own randomness, so ciphertexts differ; who sent how much, in which order, does not.
    sent = [[(topic, len(payload)) for topic, payload in run.broker.published] for run in runs]
    assert sent[0] == sent[1]
    assert [radio.use for radio in runs[0].radios.values()] == [radio.use for radio in runs[1].radios.values()]


def test_who_is_cut_off_takes_part_when_the_partition_ends(tmp_path: Path) -> None:
    fleet = _study(tmp_path / "study", PARTITION)
    cut_off = [device for device in fleet.radios if fleet.schedule(device).outages()]
    assert 0 < len(cut_off) < len(fleet.radios)
    began_s = {device: fleet.journals[device].named("connected")[0]["at_s"] - BEGAN_S for device in fleet.radios}
    for device, at_s in began_s.items():
        assert (at_s >= 90) == (device in cut_off)
