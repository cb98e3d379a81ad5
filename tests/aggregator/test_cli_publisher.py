"""``covey-aggregator publisher``: publishers sign what an aggregator exported, each on a machine of their own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import cli_models
from aggregator.assembly import AggregatorFiles
from device_client.assembly import DeviceFiles
from fl_protocol import bundle as bundle_module
from fl_protocol.adapters.key_files import create_key, load_key
from fl_protocol.bundle import ModelBundle, add_signature, check_derived, examine_bundle, open_bundle, pack_bundle
from fl_protocol.errors import BundleError, ConfigError
from fl_protocol.signing import public_key_from_hex, public_key_hex
from tests.aggregator.operator_desk import BUNDLES, CONFIG, PUBLISHER, Operator, Running, one_sentence, operator
from tests.enrolments import broken_copy
from tests.fl_protocol.test_bundle import members_of, zipped

__all__ = ["operator"]
NAMES = ("anna", "bela", "cleo")
DEVICE = """
[device]
store = "store"
store_key = "store.key"
[privacy]
epsilon = 3.0
delta = 1e-5
[[study]]
tenant = "clinic"
task = "watch"
bundle = "model.covey"
aggregator_key = "{aggregator}"
broker = {{ host = "localhost", port = 1883 }}
{publishers}
"""


def keygen(operator: Operator, name: str) -> str:
    """A publisher's machine, a folder; its public key."""
    (operator.folder / name).mkdir()
    return operator.says("publisher", "keygen", "--out", f"./{name}/publisher.key").strip()


def device(operator: Operator, publishers: str, *, aggregator: str = "ab" * 32) -> DeviceFiles:
    path = operator.folder / "device.toml"
    path.write_text(DEVICE.format(aggregator=aggregator, publishers=publishers))
    return DeviceFiles.load(path)


def opened(files: DeviceFiles) -> ModelBundle:
    return files.open_bundle(files.config.studies[0])


def two_of(keys: list[str]) -> str:
    return f"publishers = {msgspec.json.encode(keys).decode()}\npublisher_threshold = 2"


def carried(operator: Operator, start: str, end: str) -> None:
    shutil.copy(operator.folder / start, operator.folder / end)


def test_two_of_three_publishers_sign_on_machines_of_their_own_and_the_device_takes_the_model(
    operator: Operator,
) -> None:
    aggregator = operator.says("init", "CONFIG").strip()
    operator.says("task", "create", "./watch.toml", "CONFIG")
    Running(operator).round("watch")
    operator.says("model", "tag", "watch", "1", "released", "CONFIG")
    approved = operator.json("model", "show", "watch", "released", "CONFIG")["model"]["digest"]
    code, _, err = operator.run("model", "export", "watch", "CONFIG", "--tag", "released", "--out", "./out")
    assert (code, "is not signed" in err) == (0, True)
    keys = [keygen(operator, name) for name in NAMES]
    files = device(operator, two_of(keys), aggregator=aggregator)

    carried(operator, "out/model.covey", "anna/model.covey")
    checked = ["--expect-digest", approved, "--origin", f"{BUNDLES}/watch_features.covey"]
    said = operator.says("publisher", "sign", "./anna/model.covey", "--key", "./anna/publisher.key", *checked)
    assert [word in said for word in (approved, keys[0], "watch_features", "it has 1 signatures")] == [True] * 4
    carried(operator, "anna/model.covey", "model.covey")
    with pytest.raises(BundleError, match="signed by 1 of the 3 pinned publishers, and 2 of them must have signed"):
        opened(files)
    carried(operator, "anna/model.covey", "cleo/model.covey")
    operator.says("publisher", "sign", "./cleo/model.covey", "--key", "./cleo/publisher.key", *checked)
    carried(operator, "cleo/model.covey", "model.covey")
    found = opened(files)
    assert (found.manifest.version, found.shared_digest.hex()) == (_origin().manifest.version + 1, approved)

    for other in ([keys[0], keys[1], aggregator], [keys[1], aggregator, PUBLISHER]):
        with pytest.raises(BundleError, match="of the 3 pinned publishers"):
            opened(device(operator, two_of(other), aggregator=aggregator))
    assert opened(device(operator, f'publisher_key = "{keys[2]}"')).manifest == found.manifest


def _origin() -> ModelBundle:
    data = (BUNDLES / "watch_features.covey").read_bytes()
    return open_bundle(data, publisher=public_key_from_hex(PUBLISHER))


# Keys.


def test_a_key_is_for_its_owner_alone_and_never_overwritten(operator: Operator) -> None:
    key = keygen(operator, "anna")
    path = operator.folder / "anna" / "publisher.key"
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert public_key_hex(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(before.decode())).public_key()) == key
    one_sentence(operator.run("publisher", "keygen", "--out", "./anna/publisher.key"), 1, "never overwritten")
    assert path.read_bytes() == before
    one_sentence(operator.run("publisher", "keygen", "--out", "./nobody/k"), 1, "nobody/k cannot be written")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"aa" * 32, 0o644, "can be read by others; run chmod 600"),
        (b"xyz", 0o600, "does not hold an Ed25519 private key"),
        (b"", 0o600, "does not hold"),
        (b"\xff" * 31, 0o600, "does not hold"),
        (b"aa" * 31, 0o600, "does not hold"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_what_is_no_key_signs_nothing(operator: Operator, content: bytes | None, mode: int, words: str) -> None:
    path, before = operator.folder / "k", (operator.folder / "model.covey").read_bytes()
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    one_sentence(operator.run("publisher", "sign", "./model.covey", "--key", "./k"), 1, words)
    assert (operator.folder / "model.covey").read_bytes() == before


# Signing.


def test_another_digest_than_was_approved_is_not_signed(operator: Operator) -> None:
    keygen(operator, "anna")
    before = (operator.folder / "model.covey").read_bytes()
    digest = _origin().shared_digest.hex()
    sign = ["publisher", "sign", "./model.covey", "--key", "./anna/publisher.key", "--expect-digest"]
    for wrong in ("ab" * 32, digest[:16], "", examine_bundle(before).manifest_digest.hex()):
        code, _, err = operator.run(*sign, wrong)
        assert (code, "nothing was signed" in err, err.count("\n")) == (4, True, 1)
    assert (operator.folder / "model.covey").read_bytes() == before
    operator.says(*sign, f" {digest.upper()} ", "--out", "./signed.covey")
    assert (operator.folder / "model.covey").read_bytes() == before
    assert len(examine_bundle((operator.folder / "signed.covey").read_bytes()).signatures) == 2


def test_a_second_signature_and_what_is_no_bundle_are_refused_in_a_sentence(operator: Operator) -> None:
    keygen(operator, "anna")
    sign = ["--key", "./anna/publisher.key"]
    operator.says("publisher", "sign", "./model.covey", *sign)
    once = (operator.folder / "model.covey").read_bytes()
    code, _, err = operator.run("publisher", "sign", "./model.covey", *sign)
    assert (code, "has signed the bundle already" in err) == (1, True)
    assert (operator.folder / "model.covey").read_bytes() == once
    (operator.folder / "text.covey").write_text("no bundle")
    for command in (["sign", "./text.covey", *sign], ["show", "./text.covey"]):
        one_sentence(operator.run("publisher", *command), 4, "not a readable zip")
    one_sentence(operator.run("publisher", "sign", "./gone.covey", *sign), 2, "readable file", "gone.covey")
    one_sentence(operator.run("publisher", "show", "./gone.covey"), 2, "gone.covey")


def test_copies_that_were_signed_apart_are_put_together(operator: Operator) -> None:
    keys = [keygen(operator, name) for name in ("anna", "ben", "cleo")]
    for name in ("anna", "ben", "cleo"):
        carried(operator, "model.covey", f"{name}/model.covey")
    carried(operator, "model.covey", "unsigned.covey")
    copies = ["./anna/model.covey", "./ben/model.covey"]
    for name in ("anna", "ben", "cleo"):
        operator.says("publisher", "sign", f"./{name}/model.covey", "--key", f"./{name}/publisher.key")
    # The first twice, and one that its publisher has not signed: each signature is there once.
    said = operator.says("publisher", "merge", *copies, *copies, "./unsigned.covey", "--out", "./both.covey")
    assert said.endswith("both.covey: it has 3 signatures\n")  # with the one that the model came with
    show = ["publisher", "show", "./both.covey", *(word for key in keys for word in ("--publisher", key))]
    assert operator.json(*show, "--threshold", "2")["signed_by"] == keys[:2]
    assert operator.run(*show, "--threshold", "3")[0] == 4
    with pytest.raises(BundleError, match="signed by 0 of the 3"):
        opened(device(operator, two_of(keys)))
    carried(operator, "both.covey", "model.covey")
    assert len(opened(device(operator, two_of(keys))).shared_params)


def test_what_is_not_a_copy_is_not_put_together(operator: Operator) -> None:
    other = operator.folder / "other.covey"
    other.write_bytes((BUNDLES / "har_gru.covey").read_bytes())
    told = operator.run("publisher", "merge", "./model.covey", "./other.covey", "--out", "./both.covey")
    one_sentence(told, 4, "Bundle 2 is not a copy of the first")
    other.write_bytes(other.read_bytes()[:-9])
    one_sentence(operator.run("publisher", "merge", "./other.covey", "--out", "./both.covey"), 4, "not a readable zip")
    many = [keygen(operator, f"p{number}") for number in range(17)]
    copies = []
    for number in range(len(many)):
        copies.append(f"./p{number}/model.covey")
        carried(operator, "model.covey", copies[-1][2:])
        operator.says("publisher", "sign", copies[-1], "--key", f"./p{number}/publisher.key")
    told = operator.run("publisher", "merge", *copies, "--out", "./both.covey")
    assert (told[0], "expected at most 16 signatures together, got 18" in told[2]) == (1, True), told
    assert not (operator.folder / "both.covey").exists()


def test_a_signed_file_keeps_the_access_it_had(operator: Operator) -> None:
    keygen(operator, "anna")
    path = operator.folder / "model.covey"
    path.chmod(0o640)
    operator.says("publisher", "sign", "./model.covey", "--key", "./anna/publisher.key")
    assert path.stat().st_mode & 0o777 == 0o640


def repacked(**changes: Any) -> bytes:
    """The origin with something else in it, unsigned."""
    bundle = _origin()
    parts: dict[str, Any] = {
        "graph": bundle.graph,
        "infer_template": bundle.infer_template,
        "params": bundle.params,
        "keras_json": bundle.keras_json,
        "frozen": bundle.frozen,
    }
    manifest = msgspec.structs.replace(bundle.manifest, **{k: v for k, v in changes.items() if k not in parts})
    return pack_bundle(manifest, **{**parts, **{k: v for k, v in changes.items() if k in parts}}, publisher_key=None)


CHANGES: dict[str, dict[str, Any]] = {
    "graph.tflite": {"graph": b"a graph that clips nothing"},
    "infer.tflite": {"infer_template": _origin().infer_template + b"x"},
    "keras.json": {"keras_json": b"{}"},
    "frozen.npy": {"frozen": np.ones(3, np.float32)},
    "manifest": {"preprocessing": "another"},
}


def check_a_trained_model_is_its_origins(module: ModuleType) -> None:
    """But for parameters, version and description, which training changes."""
    origin = _origin()
    params = origin.params + np.float32(1)
    trained = repacked(params=params, version=origin.manifest.version + 5, description="trained")
    module.check_derived(examine_bundle(trained).bundle, origin)
    for what, change in CHANGES.items():
        with pytest.raises(BundleError, match=f"another .*{re.escape(what)}"):
            module.check_derived(examine_bundle(repacked(**change)).bundle, origin)


def test_what_is_signed_is_what_training_from_the_origin_gives() -> None:
    check_a_trained_model_is_its_origins(bundle_module)
    with pytest.raises(BundleError, match="expected at least that"):
        check_derived(examine_bundle(repacked(version=0)).bundle, _origin())


def test_personal_parameters_are_the_origins() -> None:
    origin = _origin()
    fewer = msgspec.structs.replace(origin.manifest, num_shared_parameters=origin.manifest.num_shared_parameters - 3)
    personal = msgspec.structs.replace(origin, manifest=fewer)
    for place, good in ((0, True), (-1, False)):
        params = origin.params.copy()
        params[place] += 1
        changed = msgspec.structs.replace(personal, params=params)
        if good:
            check_derived(changed, personal)
        else:
            with pytest.raises(BundleError, match="another personal parameters"):
                check_derived(changed, personal)


@pytest.mark.parametrize(
    "line",
    [
        "GRAPH: bundle.graph != origin.graph,",
        "INFER: bundle.infer_template != origin.infer_template,",
        "KERAS: bundle.keras_json != origin.keras_json,",
        "FROZEN: bundle.frozen.tobytes() != origin.frozen.tobytes(),",
        '"manifest": _constant_part(bundle.manifest) != _constant_part(origin.manifest),',
    ],
)
def test_a_comparison_that_leaves_something_out_is_caught(line: str) -> None:
    with pytest.raises(pytest.fail.Exception):
        check_a_trained_model_is_its_origins(broken_copy("fl_protocol.bundle", (line, "")))


def test_a_changed_graph_is_not_signed_by_who_names_the_origin(operator: Operator) -> None:
    keygen(operator, "anna")
    carried(operator, "model.covey", "origin.covey")
    (operator.folder / "model.covey").write_bytes(repacked(graph=b"a graph that clips nothing"))
    before = (operator.folder / "model.covey").read_bytes()
    sign = ["publisher", "sign", "./model.covey", "--key", "./anna/publisher.key"]
    code, _, err = operator.run(*sign, "--origin", "./origin.covey")
    assert (code, "another graph.tflite than its origin" in err) == (4, True)
    assert (operator.folder / "model.covey").read_bytes() == before


# Showing.


def test_who_has_signed_is_shown_and_whether_it_is_enough(operator: Operator) -> None:
    keys = [keygen(operator, name) for name in NAMES]
    for name in ("cleo", "anna"):
        operator.says("publisher", "sign", "./model.covey", "--key", f"./{name}/publisher.key")
    named = [word for key in keys for word in ("--publisher", key)]
    found = operator.json("publisher", "show", "./model.covey", *named, "--threshold", "2")
    data = (operator.folder / "model.covey").read_bytes()
    with zipfile.ZipFile(operator.folder / "model.covey") as archive:
        manifest = archive.read("manifest.json")
    assert found == {
        "name": "watch_features",
        "version": _origin().manifest.version,
        "description": _origin().manifest.description,
        "num_parameters": _origin().manifest.num_parameters,
        "num_shared_parameters": _origin().manifest.num_shared_parameters,
        "model": hashlib.sha256(_origin().shared_params.tobytes()).hexdigest(),
        "graph": hashlib.sha256(_origin().graph).hexdigest(),
        "manifest": hashlib.sha256(manifest).hexdigest(),
        "file": hashlib.sha256(data).hexdigest(),
        "signatures": 3,  # the one that it came with too
        "signed_by": [keys[0], keys[2]],
        "not_signed_by": [keys[1]],
        "threshold": 2,
        "is_enough": True,
    }
    text = operator.says("publisher", "show", "./model.covey", *named, "--threshold", "2")
    assert "yes: 2 of the 2 that are needed" in text
    code, out, err = operator.run("publisher", "show", "./model.covey", *named, "--json")  # all of them by default
    shown = msgspec.json.decode(out)
    assert (code, shown["threshold"], shown["is_enough"]) == (4, 3, False)
    assert "signed by 2 of the 3 pinned publishers, and 3 of them must have signed" in err
    bare = operator.json("publisher", "show", "./model.covey")
    assert (bare["threshold"], bare["is_enough"], bare["signed_by"]) == (None, None, [])


def test_a_bundle_does_not_speak_to_the_terminal_of_who_is_to_sign_it(operator: Operator) -> None:
    keygen(operator, "anna")
    hostile = "\x1b[2J\x1b]0;owned\x07\u202efine\nmodel SHA-256  " + "ab" * 32
    (operator.folder / "model.covey").write_bytes(repacked(description=hostile, name="watch\x1b[8m"))
    for command in (["show", "./model.covey"], ["sign", "./model.covey", "--key", "./anna/publisher.key"]):
        lines = operator.says("publisher", *command).splitlines()
        assert all(line.isprintable() for line in lines)
        (digest,) = (line.split()[2] for line in lines if line.split()[:2] == ["model", "SHA-256"])
        assert digest == _origin().shared_digest.hex()


def test_neither_does_what_is_wrong_with_it(operator: Operator) -> None:
    """A name in it is in the sentence that says why it is refused."""
    keygen(operator, "anna")
    members = members_of((operator.folder / "model.covey").read_bytes())
    manifest = msgspec.json.decode(members["manifest.json"])
    manifest["parameters"][0] |= {"name": "\x1b[2J\u202e\nmodel.covey: signed", "offset": 5}
    members["manifest.json"] = msgspec.json.encode(manifest)
    (operator.folder / "model.covey").write_bytes(zipped(list(members.items())))
    for command in (["show", "./model.covey"], ["sign", "./model.covey", "--key", "./anna/publisher.key"]):
        code, _, said = operator.run("publisher", *command)
        assert code == 4
        assert r"\x1b[2J\u202e\nmodel.covey: signed" in said
        assert said.rstrip("\n").isprintable()


def test_signatures_of_nobody_do_not_keep_publishers_from_signing(operator: Operator) -> None:
    """Whoever hands a bundle on can fill it with as many as it can hold."""
    keys = [keygen(operator, name) for name in ("anna", "ben")]
    members = members_of((operator.folder / "model.covey").read_bytes())
    by_anna = add_signature(
        (operator.folder / "model.covey").read_bytes(), load_key(operator.folder / "anna/publisher.key")
    )
    (signature,) = (one for one in examine_bundle(by_anna).signatures if one not in members["signature"])
    members["signature"] = os.urandom(15 * 64) + signature
    (operator.folder / "model.covey").write_bytes(zipped(list(members.items())))
    sign = ["publisher", "sign", "./model.covey", "--key", "./ben/publisher.key", "--out", "./signed.covey"]
    code, _, said = operator.run(*sign)
    assert code != 0
    assert "16 signatures, as many as it can hold: leave out those of nobody you know with --publisher" in said
    said = operator.says(*sign, "--publisher", keys[0], "--publisher", keys[0])
    assert said.endswith("/signed.covey: signed; it has 2 signatures\n")
    show = ["publisher", "show", "./signed.covey", "--publisher", keys[0], "--publisher", keys[1]]
    assert operator.json(*show)["signed_by"] == keys
    # And where copies that were signed apart are put together.
    merge = ["publisher", "merge", "./model.covey", "./signed.covey", "--out", "./both.covey"]
    assert "leave out those of nobody you know" in operator.run(*merge)[2]
    named = ["--publisher", keys[0], "--publisher", keys[1]]
    assert operator.says(*merge, *named).endswith("both.covey: it has 2 signatures\n")
    assert "64 hex digits" in operator.run(*merge, "--publisher", "rubbish")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "1"], "--publisher HEX with it"),
        (["--publisher", "xyz"], "64 hex digits"),
        (["--publisher", PUBLISHER, "--publisher", PUBLISHER.upper()], "each key once"),
        (["--publisher", PUBLISHER, "--threshold", "2"], "expected 1 to 1"),
    ],
)
def test_publishers_that_cannot_be_are_refused_in_a_sentence(
    operator: Operator, options: list[str], words: str
) -> None:
    one_sentence(operator.run("publisher", "show", "./model.covey", *options), 2, words)


def check_the_aggregators_key_is_refused(module: ModuleType, folder: Path) -> None:
    (folder / "aggregator.toml").write_text(CONFIG)
    files = AggregatorFiles.load(folder / "aggregator.toml")
    files.signing_key(create=True)
    with pytest.raises(ConfigError, match="the aggregator's own key"):
        module._publishers_key(folder / "keys" / "aggregator.key", files)
    other = create_key(folder / "publisher.key")
    assert module._publishers_key(folder / "publisher.key", files).public_key() == other.public_key()


def test_an_export_that_takes_the_aggregators_key_is_caught(tmp_path: Path) -> None:
    check: Callable[[ModuleType, Path], None] = check_the_aggregators_key_is_refused
    check(cli_models, tmp_path)
    broken = broken_copy(
        "aggregator.cli_models", ("if key.public_key() == files.signing_key().public_key():", "if False:")
    )
    with pytest.raises(pytest.fail.Exception):
        check(broken, tmp_path)
