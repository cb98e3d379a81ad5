"""Who imports whom, and what a device loads: the arrows of design section 2, held by running things."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICE_MAY_LOAD = {"numpy", "cryptography", "msgspec", "paho", "ai_edge_litert", "tflite_runtime"}
OURS = {"device_client", "fl_protocol"}
# What those five load themselves: extension modules of cryptography and numpy, and msgspec's optional import.
THEIRS = {"_cffi_backend", "_openssl", "cython_runtime", "typing_extensions", "tomli"}

LIST_MODULES = """
import importlib, json, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
top = {name.partition(".")[0] for name in set(sys.modules) - before}
top = {name for name in top if not name.startswith("_cython_")}
print(json.dumps(sorted(top - set(sys.stdlib_module_names))))
"""


def loaded_by(*modules: str) -> set[str]:
    """Top-level names, the standard library's aside, that a fresh process has after importing `modules`."""
    result = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *modules], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(result.stdout))


def test_the_import_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_a_device_loads_only_what_it_may() -> None:
    loaded = loaded_by("device_client.cli", "device_client.assembly", "fl_protocol.adapters.mqtt")
    assert loaded - OURS - THEIRS <= DEVICE_MAY_LOAD
    assert loaded >= OURS


def test_a_device_that_trains_loads_only_what_it_may() -> None:
    code = LIST_MODULES.replace("for name in sys.argv[1:]:\n    importlib.import_module(name)", "exec(sys.argv[1])")
    training = """
from pathlib import Path
import device_client.cli
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import open_bundle
from fl_protocol.signing import public_key_from_hex
folder = Path("models/bundles")
publisher = public_key_from_hex((folder / "publisher.pub").read_text())
bundle = open_bundle((folder / "watch_features.covey").read_bytes(), publisher=publisher)
TfliteGraph.of_bundle(bundle)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, training], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert loaded - OURS - THEIRS <= DEVICE_MAY_LOAD, loaded
    assert len(loaded & {"ai_edge_litert", "tflite_runtime"}) == 1


@pytest.mark.parametrize("module", ["device_client.cli", "aggregator.cli", "firmware_sim.cli", "fl_protocol.bundle"])
def test_nothing_but_the_models_room_loads_tensorflow(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & {"tensorflow", "keras", "tensorflow_privacy", "models"}


def test_a_helper_on_mqtt_alone_needs_no_https_server() -> None:
    assert not loaded_by("aggregator.helper.cli") & {"fastapi", "uvicorn", "starlette", "device_client"}
    assert "fastapi" in loaded_by("aggregator.helper.https_api")


def test_the_api_without_pages_needs_no_nicegui() -> None:
    assert not loaded_by("aggregator.api.serving") & {"nicegui", "socketio", "httpx"}
    assert "nicegui" in loaded_by("aggregator.dashboard.mounting")


def test_device_and_aggregator_do_not_know_each_other() -> None:
    assert "aggregator" not in loaded_by("device_client.cli")
    assert "device_client" not in loaded_by("aggregator.cli")


PURE = [
    "aggregator.adaptive_clipping",
    "aggregator.exact_sum",
    "aggregator.federated_results",
    "aggregator.helper.answer_chain",
    "aggregator.helper.answering",
    "aggregator.helper.known_devices",
    "aggregator.ingest",
    "aggregator.outage",
    "aggregator.pacing",
    "aggregator.partial_sums",
    "aggregator.privacy.filter",
    "aggregator.privacy.planning",
    "aggregator.privacy.record_level",
    "aggregator.robust_rules",
    "aggregator.round_events",
    "aggregator.round_state",
    "aggregator.rounds",
    "aggregator.scaffold",
    "aggregator.secure_sections",
    "aggregator.secure_terms",
    "aggregator.server_optimisers",
    "aggregator.shards",
    "aggregator.staleness",
    "aggregator.task_file",
    "aggregator.throttle",
    "aggregator.transfers",
    "device_client.config",
    "device_client.consent",
    "device_client.control_variate",
    "device_client.current_round",
    "device_client.delivery",
    "device_client.device_store",
    "device_client.downloads",
    "device_client.eligibility",
    "device_client.error_feedback",
    "device_client.feasibility",
    "device_client.floors",
    "device_client.kept_vector",
    "device_client.ledger",
    "device_client.manifest_checks",
    "device_client.model_route",
    "device_client.model_supply",
    "device_client.new_records",
    "device_client.outbox",
    "device_client.participation",
    "device_client.pseudonyms",
    "device_client.readiness",
    "device_client.record_sums",
    "device_client.recordings.window_store",
    "device_client.refusals",
    "device_client.secure_update",
    "device_client.session",
    "device_client.training",
    "firmware_sim.attackers.kinds",
    "firmware_sim.attackers.mislabelling",
    "firmware_sim.attackers.parsing",
    "firmware_sim.attackers.plan",
    "firmware_sim.attackers.training",
    "firmware_sim.attackers.trigger",
    "firmware_sim.board.availability",
    "firmware_sim.board.board_state",
    "firmware_sim.board.flash_wear",
    "firmware_sim.board.physics",
    "firmware_sim.board.virtual_board",
    "firmware_sim.chance",
    "firmware_sim.clock.real_time_clock",
    "firmware_sim.faults.parsing",
    "firmware_sim.faults.plan",
    "firmware_sim.faults.trickling_edge",
    "firmware_sim.firmware.life",
    "firmware_sim.fleet.job_starts",
    "firmware_sim.fleet.windows",
    "firmware_sim.labelled_chance",
    "firmware_sim.profiles.hardware_profile",
    "firmware_sim.profiles.population",
    "firmware_sim.radio.radio",
    "firmware_sim.radio.transport",
    "firmware_sim.sensors.config",
    "firmware_sim.sensors.diary",
    "firmware_sim.sensors.draws",
    "firmware_sim.sensors.drift",
    "firmware_sim.sensors.label_noise",
    "firmware_sim.sensors.motion",
    "firmware_sim.sensors.sensor",
    "firmware_sim.sensors.synthetic",
    "firmware_sim.sensors.wearer",
    "firmware_sim.wearer.habits",
    "firmware_sim.wearer.situation",
    "firmware_sim.wearer.traces",
    "firmware_sim.wearer.wearer",
    "fl_protocol.back_off",
    "fl_protocol.client_certificates",
    "fl_protocol.encoding",
    "fl_protocol.helper_config",
    "fl_protocol.integer_noise",
    "fl_protocol.model_delta",
    "fl_protocol.plans",
    "fl_protocol.recency",
    "fl_protocol.record_sums",
    "fl_protocol.renyi",
    "fl_protocol.secagg.reference",
    "fl_protocol.squared_norm",
    "fl_protocol.update_encoding",
]
BOUND_TOGETHER = ["device_client.studies", "device_client.daemon", "device_client.device", "device_client.control"]
"""What runs on virtual ports in the simulator: of the adapters it knows the journal's form only."""


LIST_ADAPTERS = """
import importlib, json, os, sys, traceback
import cryptography.hazmat.primitives.asymmetric.ed25519, cryptography.x509, msgspec, numpy
for module in sys.argv[1:]:
    answer, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
            names = [name for name in sys.modules if ".adapters" in name
                     or name in ("paho", "sqlalchemy", "ai_edge_litert", "tflite_runtime")]
            with open(told, "w") as pipe:
                json.dump([module, names], pipe)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)
    with open(answer) as pipe:
        print(pipe.read(), flush=True)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported")
"""
"""Each module in a process of its own, forked from one that has loaded only what every one of them may load."""


@cache
def adapters_loaded() -> dict[str, set[str]]:
    """Adapters, and outside libraries of adapters, that a process has after importing each module alone."""
    modules = [*PURE, *BOUND_TOGETHER, "device_client.assembly"]
    result = subprocess.run(
        [sys.executable, "-c", LIST_ADAPTERS, *modules], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return {module: set(names) for module, names in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("module", PURE)
def test_the_pure_core_loads_no_adapter_and_no_outside_library_of_one(module: str) -> None:
    assert adapters_loaded()[module] == set()


@pytest.mark.parametrize("module", BOUND_TOGETHER)
def test_the_device_that_is_bound_together_loads_no_adapter_but_the_journal(module: str) -> None:
    assert adapters_loaded()[module] <= {"fl_protocol.adapters", "fl_protocol.adapters.journal"}


def test_an_adapter_that_is_loaded_is_noticed() -> None:
    assert "device_client.adapters.encrypted_files" in adapters_loaded()["device_client.assembly"]
