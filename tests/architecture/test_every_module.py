"""Every module of the five packages can be imported, with TensorFlow or without, with whatever releases there are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("fl_protocol", "device_client", "aggregator", "models", "firmware_sim")
OF_THE_DEVELOPERS_ENVIRONMENT = {"tensorflow", "tensorflow_privacy", "ray"}
"""What `pip install covey[test]` leaves out: modules that need it are imported where it is installed."""
LEAST_MODULES = 150
RUN_BY_ALEMBIC = "aggregator.store.migrations.env"
"""Works inside a migration only; tests/aggregator/store/test_migrations.py runs it there."""

IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error.name)
    except BaseException as error:
        sys.exit(f"{name}: {error!r}")
"""


def modules() -> list[str]:
    files = (path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    names = {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}
    return sorted(names - {RUN_BY_ALEMBIC})


def not_importable(names: list[str]) -> dict[str, str]:
    """Modules that a fresh process cannot import, each with the module that is missing."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_module_is_imported() -> None:
    names = modules()
    assert len(names) >= LEAST_MODULES
    failed = not_importable(names)
    for name, missing in failed.items():
        top = missing.partition(".")[0]
        assert top in OF_THE_DEVELOPERS_ENVIRONMENT, f"{name} needs {missing}"
        assert importlib.util.find_spec(top) is None, f"{name} does not find {missing}, which is installed"
        assert name.startswith("models.") or top == "ray", f"{name} needs {missing}"


def test_a_module_that_cannot_be_imported_is_told() -> None:
    assert not_importable(["json", "no_such_package.module"]) == {"no_such_package.module": "no_such_package"}
