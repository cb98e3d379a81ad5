"""Model bundles: verified whole or refused, whatever was done to the file."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol.bundle import MAX_MEMBER_BYTES, open_bundle, pack_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.model_manifest import (
    BundleManifest,
    ClipGroup,
    DropoutMask,
    InputSchema,
    LabelSchema,
    LayerInfo,
    LossSpec,
    ParameterSpec,
    TrainingDefaults,
)

PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)
PARAMS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], np.float32)
KERAS = b"{}"
FROZEN = np.array([0.5, -0.5], np.float32)
GRAPH, INFER = b"graph " * 50, b"head" + PARAMS.tobytes() + b"tail"
MANIFEST = BundleManifest(
    format=2,
    name="tiny",
    version=4,
    description="for tests",
    data="none",
    batch_size=8,
    num_parameters=7,
    num_shared_parameters=6,
    parameters=(ParameterSpec("dense/kernel", (2, 3), 0), ParameterSpec("dense/bias", (1,), 6)),
    layers=(LayerInfo("dense", "Dense", (3,), 7, {"kernel": "gram"}),),
    input=InputSchema((10, 2), ("x", "y"), ("g", "g"), 50.0),
    label=LabelSchema("class", ("rest", "walk")),
    loss=LossSpec("softmax_cross_entropy"),
    preprocessing="none",
    defaults=TrainingDefaults(0.1, 1.0, 0.9),
    norm_clips=(ClipGroup(("dense",), 1.0),),
    dropout=(DropoutMask("drop", 0.5, 4),),
    train_flops=100,
    train_arena_bytes=1000,
    infer_params_offset=4,
)
MEMBERS = ("manifest.json", "signature", "graph.tflite", "infer.tflite", "params.npy", "keras.json", "frozen.npy")


def pack(
    manifest: BundleManifest = MANIFEST,
    *,
    params: Any = PARAMS,
    infer: bytes = INFER,
    publisher_key: Ed25519PrivateKey | None = PUBLISHER,
) -> bytes:
    return pack_bundle(
        manifest,
        graph=GRAPH,
        infer_template=infer,
        params=params,
        keras_json=KERAS,
        frozen=FROZEN,
        publisher_key=publisher_key,
    )


GOOD = pack()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def signed_with(change: Callable[[dict[str, Any]], None] | None = None, **members: bytes) -> bytes:
    """A bundle that the real publisher signed although `change` was done to its manifest, or members replaced."""
    content = {**members_of(GOOD), **{name.replace("_", "."): data for name, data in members.items()}}
    manifest = msgspec.json.decode(content["manifest.json"])
    for name in ("graph.tflite", "infer.tflite", "params.npy", "keras.json", "frozen.npy"):
        manifest["members"][name] = hashlib.sha256(content[name]).hexdigest()
    if change is not None:
        change(manifest)
    content["manifest.json"] = msgspec.json.encode(manifest)
    content["signature"] = PUBLISHER.sign(b"covey bundle v2\0" + content["manifest.json"])
    return zipped(list(content.items()))


def refused(data: bytes, match: str, **arguments: Any) -> None:
    with pytest.raises(BundleError, match=match):
        open_bundle(data, publisher=PUBLISHER.public_key(), **arguments)


def test_a_packed_bundle_opens_with_all_that_was_put_in() -> None:
    bundle = open_bundle(GOOD, publisher=PUBLISHER.public_key(), minimum_version=4)
    assert (bundle.graph, bundle.infer_template) == (GRAPH, INFER)
    np.testing.assert_array_equal(bundle.params, PARAMS)
    assert msgspec.structs.replace(bundle.manifest, members={}) == MANIFEST
    assert bundle.graph_digest == hashlib.sha256(GRAPH).digest()
    assert open_bundle(signed_with(), publisher=PUBLISHER.public_key()).graph == GRAPH  # the recipe below works


def test_packing_the_same_twice_gives_the_same_bytes() -> None:
    assert pack() == GOOD


def test_the_inference_model_holds_the_given_parameters_and_nothing_else_changes() -> None:
    bundle = open_bundle(GOOD, publisher=PUBLISHER.public_key())
    assert bundle.inference_model(-PARAMS) == b"head" + (-PARAMS).tobytes() + b"tail"
    with pytest.raises(LocalMisuseError, match=r"float32 \[7\]"):
        bundle.inference_model(PARAMS[:6])
    with pytest.raises(LocalMisuseError, match="NaN"):
        bundle.inference_model(np.full(7, np.nan, np.float32))


@pytest.mark.parametrize("member", MEMBERS)
def test_a_flipped_bit_in_any_member_is_refused(member: str) -> None:
    content = members_of(GOOD)
    size = len(content[member])
    for bit in {0, 7, 8 * size - 1, *range(0, 8 * size, max(1, size // 8))}:
        damaged = bytearray(content[member])
        damaged[bit // 8] ^= 1 << bit % 8
        refused(zipped(list({**content, member: bytes(damaged)}.items())), "not signed by|does not match its signed")


@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_the_file_changes_nothing_or_is_refused(at: int, bit: int) -> None:
    damaged = bytearray(GOOD)
    damaged[at] ^= 1 << bit
    try:
        bundle = open_bundle(bytes(damaged), publisher=PUBLISHER.public_key())
    except BundleError:
        return
    assert (bundle.graph, bundle.infer_template, bundle.params.tobytes()) == (GRAPH, INFER, PARAMS.tobytes())


@given(data=st.binary(max_size=200) | st.integers(0, len(GOOD)).map(lambda length: GOOD[:length]))
def test_files_that_are_no_bundle_are_refused(data: bytes) -> None:
    if data != GOOD:
        refused(data, "The bundle")


def test_another_publishers_bundle_is_refused() -> None:
    with pytest.raises(BundleError, match="not signed by the pinned publisher"):
        open_bundle(GOOD, publisher=Ed25519PrivateKey.from_private_bytes(bytes([4]) * 32).public_key())


def test_a_signature_made_for_something_else_is_refused() -> None:
    content = members_of(GOOD)
    content["signature"] = PUBLISHER.sign(content["manifest.json"])  # without the context
    refused(zipped(list(content.items())), "not signed by")


def test_a_lower_version_is_refused() -> None:
    refused(GOOD, "is version 4 but version 5 is installed", minimum_version=5)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_missing_member_is_refused(member: str) -> None:
    content = members_of(GOOD)
    del content[member]
    refused(zipped(list(content.items())), "should hold exactly")


@pytest.mark.parametrize("name", ["extra", "../../etc/passwd", "graph.tflite/", "GRAPH.TFLITE"])
def test_an_extra_member_is_refused(name: str) -> None:
    refused(zipped([*members_of(GOOD).items(), (name, b"x")]), "should hold exactly")


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_given_twice_is_refused(member: str) -> None:
    refused(zipped([*members_of(GOOD).items(), (member, members_of(GOOD)[member])]), "should hold exactly")


def with_declared_size(data: bytes, member: str, size: int) -> bytes:
    """The zip with another uncompressed size of `member` in its directory."""
    entry = data.rindex(member.encode()) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    return data[: entry + 24] + size.to_bytes(4, "little") + data[entry + 28 :]


def test_a_member_that_declares_too_much_is_refused_unread() -> None:
    refused(with_declared_size(GOOD, "graph.tflite", MAX_MEMBER_BYTES + 1), f"declares {MAX_MEMBER_BYTES + 1} bytes")


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_that_needs_unbounded_memory_is_refused(compression: int) -> None:
    refused(zipped(list(members_of(GOOD).items()), compression), "not stored or deflated")


OPEN_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fl_protocol.bundle import open_bundle
from fl_protocol.errors import BundleError
data = Path(sys.argv[1]).read_bytes()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), used + int(sys.argv[2])))
try:
    open_bundle(data, publisher=Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32).public_key())
except BundleError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def gibibyte_of_zeros() -> bytes:
    """A bundle whose graph is one, deflated."""
    made, zeros = io.BytesIO(), bytes(4 * 1024 * 1024)
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members_of(GOOD).items():
            if name != "graph.tflite":
                archive.writestr(name, data)
        with archive.open("graph.tflite", "w") as stream:
            for _ in range(256):
                stream.write(zeros)
    return made.getvalue()


@pytest.mark.parametrize("declared", [100, MAX_MEMBER_BYTES])
def test_a_member_that_inflates_to_more_than_it_declares_takes_little_memory(
    declared: int, gibibyte_of_zeros: bytes, tmp_path: Path
) -> None:
    """A graph that declares less than it is: memory stays under three times the declared cap."""
    bomb = tmp_path / "bomb.covey"
    bomb.write_bytes(with_declared_size(gibibyte_of_zeros, "graph.tflite", declared))
    command = [sys.executable, "-c", OPEN_IN_LITTLE_MEMORY, str(bomb), str(3 * MAX_MEMBER_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # MemoryError would be reported with an empty text: it was the size that was noticed.
    assert "Bad CRC-32 for file 'graph.tflite'" in done.stdout


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/covey-pickle-was-loaded"),))  # noqa: S108 - never created


def _npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + PARAMS.tobytes()


@pytest.mark.parametrize(
    "raw",
    [
        _npy(np.array([_Exploit()], dtype=object)),
        pickle.dumps(_Exploit()),
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff",
        zipped([("arr_0.npy", _npy(PARAMS))]),
        _npy(PARAMS.astype(np.float64)),
        _npy(PARAMS.astype(">f4")),
        _npy(PARAMS.reshape(7, 1)),
        _npy(PARAMS[:6]),
        _npy(PARAMS)[:-1],
        _npy(PARAMS) + b"\0" * 4,
        _npy(np.array([1, 2, 3, np.nan, 5, 6, 7], np.float32)),
        _npy(np.array([1, 2, 3, np.inf, 5, 6, 7], np.float32)),
        _npy(np.zeros(0, np.float32)).replace(b"(0,)", b"(2**40,)"),
        _npy(np.zeros(1, np.float32)).replace(b"(1,), }            ", b"(9999999999999,), }"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (7,"),
        with_header(b"  {\n {"),
        with_header(b"(" * 5000),
        with_header(b"{'descr': (), 'fortran_order': False, 'shape': (7,)}"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (7,), []: 1}"),
    ],
    ids=[
        "pickled array",
        "pickle",
        "empty",
        "magic only",
        "cut header",
        "zip",
        "float64",
        "big endian",
        "two dimensions",
        "too short",
        "cut",
        "trailing bytes",
        "nan",
        "infinity",
        "huge declared",
        "larger than declared",
        "header without an end",
        "header indented",
        "header nested",
        "header with no type",
        "header with a list for a key",
    ],
)
def test_parameters_that_are_no_finite_vector_are_refused_even_if_signed(raw: bytes) -> None:
    refused(signed_with(params_npy=raw), r"params\.npy cannot be used")
    assert not Path("/tmp/covey-pickle-was-loaded").exists()  # noqa: S108


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["parameters"][1].update(offset=5), "offset 5; 6 was expected"),
        (lambda m: m["parameters"][0].update(offset=-1), "offset -1; 0 was expected"),
        (lambda m: m["parameters"][1].update(shape=[2]), "add up to 8, not to num_parameters=7"),
        (lambda m: m["parameters"][0].update(shape=[-2, -3]), "was expected"),
        (lambda m: m["parameters"][0].update(shape=[2**62, 4]), "was expected"),
        (lambda m: m["parameters"].pop(), "add up to 6"),
        (lambda m: m.update(infer_params_offset=-1), "infer_params_offset -1 lies outside"),
        (lambda m: m.update(infer_params_offset=9), "infer_params_offset 9 lies outside its infer.tflite of 36 bytes"),
        (lambda m: m.update(format=1), "has format 1"),
        (lambda m: m.update(format=3, something="new"), "has format 3"),
        (lambda m: m.update(num_shared_parameters=5), "num_shared_parameters=5"),
        (lambda m: m.update(num_shared_parameters=0), "num_shared_parameters=0"),
        (lambda m: m.update(num_shared_parameters=8), "num_shared_parameters=8"),
        (lambda m: m["norm_clips"][0].update(share=1.1), "norm_clips"),
        (lambda m: m["norm_clips"][0].update(share=-1.0), "norm_clips"),
        (lambda m: m.update(norm_clips=[]), "norm_clips"),
        (lambda m: m["dropout"][0].update(rate=1.0), "dropout of drop has rate 1"),
        (lambda m: m["dropout"][0].update(units=0), "0 units"),
        (lambda m: m.update(batch_size=0), "batch_size is 0"),
        (lambda m: m["label"].update(kind="input"), "label of kind input"),
        (lambda m: m["label"].update(units=["m"]), "label of kind class"),
        (lambda m: m["label"].update(names=["rest", "rest"]), "names one thing twice"),
        (lambda m: m["label"].update(tolerance=-1.0), "tolerance -1"),
        (lambda m: m["input"].update(sampling_rate_hz=-50.0), "sampling rate is -50"),
        (lambda m: m["defaults"].update(l2_norm_clip=0.0), "expected numbers above 0"),
        (lambda m: m["defaults"].update(server_momentum=1.0), "momentum below 1"),
        (lambda m: m.update(surprise=1), "cannot be read"),
        (lambda m: m.pop("label"), "cannot be read"),
        (lambda m: m["members"].pop("graph.tflite"), "does not match its signed digest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_contradicts_itself_is_refused_even_if_signed(
    change: Callable[[dict[str, Any]], None], match: str
) -> None:
    refused(signed_with(change), match)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"format": ' + b"[" * 100_000, b'{"format": "\xff"}', b"", b"null"])
def test_a_manifest_that_is_none_is_refused_even_if_signed(text: bytes) -> None:
    signature = PUBLISHER.sign(b"covey bundle v2\0" + text)
    members = {**members_of(GOOD), "manifest.json": text, "signature": signature}
    refused(zipped(list(members.items())), "cannot be read")


@pytest.mark.parametrize("params", [PARAMS[:6], PARAMS.astype(np.float64), np.full(7, np.inf, np.float32)])
def test_a_publisher_cannot_pack_parameters_that_nobody_would_open(params: Any) -> None:
    with pytest.raises(LocalMisuseError, match="parameters: expected"):
        pack(params=params)


def test_a_manifest_that_nobody_could_open_is_not_signed() -> None:
    with pytest.raises(LocalMisuseError, match=r"No device could open this bundle: .*offset 5"):
        pack(msgspec.structs.replace(MANIFEST, parameters=(ParameterSpec("a", (7,), 5),)))
