"""On a device there is one trainer, `LocalTraining`: what replaces it is the simulator's."""

from __future__ import annotations

import ast
from pathlib import Path

from device_client.device_ports import DevicePorts
from device_client.participation import Participant
from device_client.training import LocalTraining

ROOT = Path(__file__).parents[2]


def passed_trainers(source: str) -> list[str]:
    """What a module passes as a trainer, or sets as one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trainer":
            found.append(ast.unparse(node.value))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Attribute) and one.attr == "trainer" for one in targets):
                found.append(ast.unparse(node))
    return found


def test_a_devices_own_code_never_passes_another_trainer() -> None:
    sources = {path: path.read_text() for path in (ROOT / "device_client").rglob("*.py")}
    passed = {path.name: found for path, source in sources.items() if (found := passed_trainers(source))}
    assert passed == {"device.py": ["self._ports.trainer"]}  # handed on from the ports, which nobody gives another
    assert any("DevicePorts(" in source for path, source in sources.items() if path.name != "device_ports.py")
    for kind in (DevicePorts, Participant):
        assert kind.__dataclass_fields__["trainer"].default is LocalTraining


def test_a_device_that_passes_another_trainer_is_caught() -> None:
    assert passed_trainers("ports = DevicePorts(store=store, trainer=EmptyTrainer(1.0))") == ["EmptyTrainer(1.0)"]
    assert passed_trainers("device.trainer = other") == ["device.trainer = other"]
