"""The committed bundles are what the code builds."""

from __future__ import annotations

from functools import cache

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.bundle import ModelBundle, open_bundle

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

from oracle_cases import model_cases, signature  # noqa: E402

from models import catalog  # noqa: E402
from models.build import build_bundle  # noqa: E402


@cache
def rebuild(model: str, version: int) -> ModelBundle:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    return open_bundle(
        build_bundle(catalog.load(model), publisher_key=key, version=version), publisher=key.public_key()
    )


def test_a_committed_bundle_equals_a_rebuild(bundle: ModelBundle, model: str, runtime: str) -> None:
    rebuilt = rebuild(model, bundle.manifest.version)
    # Digests may differ with the converter's version; everything a device relies on may not.
    ours, theirs = (msgspec.structs.replace(b.manifest, members={}, infer_params_offset=0) for b in (bundle, rebuilt))
    assert ours == theirs
    np.testing.assert_array_equal(bundle.params, rebuilt.params)
    case = model_cases(model, 32)["partial, half clipped"]
    ours, theirs = (signature(b.graph, runtime, "train")(**case.inputs) for b in (bundle, rebuilt))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6 * np.abs(theirs[name]).max())


def test_the_initial_parameters_are_sensible(bundle: ModelBundle, model: str) -> None:
    by_name = {
        spec.name: bundle.params[spec.offset : spec.offset + int(np.prod(spec.shape))].reshape(spec.shape)
        for spec in bundle.manifest.parameters
    }
    if model == "watch_features":
        assert list(by_name) == ["logits/kernel"]
        assert not by_name["logits/kernel"].any()
        return
    for name, values in by_name.items():
        if name.endswith(("bias", "/beta")):
            assert not values.any(), name
        elif name.endswith("/kernel"):
            # Uniform on ±limit, limit² = 6 / (inputs + outputs), both times the receptive field (Glorot & Bengio 2010).
            *field, inputs, outputs = values.shape
            limit = (6 / (np.prod(field) * (inputs + outputs))) ** 0.5
            assert np.abs(values).max() <= limit
            assert values.std() == pytest.approx(limit / 3**0.5, rel=0.25), name
