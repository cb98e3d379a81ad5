"""``secagg.json``, replayed; what a second implementation would have to give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_protocol.errors import ProtocolError
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.masks import Masks
from fl_protocol.secagg.packing import pack, unpack
from fl_protocol.secagg.parties import included_digest
from tests.fl_protocol.secagg.rounds import residues, secure_round
from tests.vectors.test_vectors import FILES, each

_SETTINGS = ("length", "l2_norm_clip", "step", "most_updates", "noise_bound", "rotates")


@each("secagg", "fixed_point")
def test_an_update_becomes_these_integers(vector: dict[str, Any]) -> None:
    point = FixedPoint(**{name: vector[name] for name in _SETTINGS})
    assert (point.bits, point.coordinate_bound) == (vector["bits"], vector["coordinate_bound"])
    assert point.norm_bound == pytest.approx(vector["norm_bound"], rel=1e-12)
    draws, seed = bytes.fromhex(vector["draws"]), bytes.fromhex(vector["rotation_seed"])
    values = np.frombuffer(bytes.fromhex(vector["values"]), "<f4").astype(np.float32)
    integers = point.encode(values, rotation_seed=seed, entropy=lambda count: draws[:count])
    assert integers.tolist() == vector["integers"]
    assert residues(point, integers).tolist() == vector["residues"]


@each("secagg", "masks")
def test_a_seed_gives_this_mask(vector: dict[str, Any]) -> None:
    masks = Masks(length=len(vector["mask"]), bits=vector["bits"], prg=vector["prg"])
    words = masks.zeros()
    masks.add(bytes.fromhex(vector["seed"]), bytes.fromhex(vector["info"]), words)
    assert masks.reduced(words).tolist() == vector["mask"]


@each("secagg", "packing")
def test_residues_are_packed_so(vector: dict[str, Any]) -> None:
    raw, residues = bytes.fromhex(vector["packed"]), np.array(vector["residues"], np.uint32)
    assert pack(residues, vector["bits"]) == raw
    assert unpack(raw, len(residues), vector["bits"]).tolist() == vector["residues"]


@each("secagg", "must_fail")
def test_what_is_packed_otherwise_is_refused(vector: dict[str, Any]) -> None:
    assert vector["error"] == "ProtocolError"
    with pytest.raises(ProtocolError):
        unpack(bytes.fromhex(vector["packed"]), vector["length"], vector["bits"])


def test_a_seed_and_a_list_are_bound_to_this() -> None:
    found, listed = FILES["secagg"]["seed_info"], FILES["secagg"]["included"]
    terms = secure_round(
        tenant=found["tenant"],
        task=found["task"],
        number=found["round"],
        manifest_digest=bytes.fromhex(found["manifest_digest"]),
    )
    info = terms.seed_info(found["helper"], device=found["device"], update_id=bytes.fromhex(found["update_id"]))
    assert info.hex() == found["info"]
    ids = [bytes.fromhex(one) for one in listed["update_ids"]]
    assert included_digest(reversed(ids)).hex() == listed["digest"]
