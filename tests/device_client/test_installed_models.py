"""A device never takes an older version of a model in place of a newer one, over any restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from device_client.errors import StoreError
from device_client.installed_models import InstalledModels
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import BundleError
from tests.device_client.one_device import BUNDLE, OneDevice
from tests.device_client.ports import MemoryStore
from tests.enrolments import broken_copy

STUDY = "clinic/watch"


def of_version(bundle: ModelBundle, version: int, **changes: Any) -> ModelBundle:
    """The same bundle under another version."""
    manifest = msgspec.structs.replace(bundle.manifest, version=version, **changes)
    return msgspec.structs.replace(bundle, manifest=manifest)


def check_nothing_older_is_taken(bundle: ModelBundle, kind: Callable[[MemoryStore], InstalledModels]) -> None:
    store = MemoryStore()
    assert kind(store).accepted(STUDY, of_version(bundle, 4)).manifest.version == 4
    kind(store).accepted(STUDY, of_version(bundle, 4))
    store = store.after_restart()
    kind(store).accepted(STUDY, of_version(bundle, 7))
    again = store.after_restart()
    with pytest.raises(BundleError, match=r"version 6, and version 7 was accepted before"):
        kind(again).accepted(STUDY, of_version(bundle, 6))
    # Another model, and another study, have versions of their own.
    kind(again).accepted(STUDY, of_version(bundle, 1, name="another"))
    kind(again).accepted("clinic/steps", of_version(bundle, 1))
    with pytest.raises(BundleError):
        kind(again).accepted(STUDY, of_version(bundle, 4))


@pytest.fixture
def bundle() -> ModelBundle:
    return BUNDLE


def test_an_older_model_is_refused_over_restarts(bundle: ModelBundle) -> None:
    check_nothing_older_is_taken(bundle, InstalledModels)


@pytest.mark.parametrize(
    "change",
    [
        ("if version < newest:", "if version < newest - 1:"),
        ("_Newest({**known.versions, name: version})", "_Newest({name: version})"),
        ('self._store.write(study_blob("bundle", study), msgspec.msgpack.encode(updated))', "str(updated)"),
    ],
)
def test_a_device_that_forgets_what_it_has_accepted_is_caught(bundle: ModelBundle, change: tuple[str, str]) -> None:
    broken = broken_copy("device_client.installed_models", change)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_nothing_older_is_taken(bundle, broken.InstalledModels)


def test_a_full_disk_keeps_no_device_from_starting(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    InstalledModels(store).accepted(STUDY, of_version(bundle, 4))

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(store, "write", full)
    InstalledModels(store).accepted(STUDY, of_version(bundle, 5))
    with pytest.raises(BundleError):
        InstalledModels(store).accepted(STUDY, of_version(bundle, 3))


def test_a_started_device_refuses_it_with_a_sentence() -> None:
    one = OneDevice()
    one.bundle = of_version(one.bundle, 9)
    one.start()
    one.bundle = of_version(one.bundle, 8)
    with pytest.raises(BundleError, match="version 9 was accepted before"):
        one.start()
    one.bundle = of_version(one.bundle, 10)
    one.start()
