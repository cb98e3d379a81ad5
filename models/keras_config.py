"""What a Keras configuration may name: it can name any class or function of any module, and Keras imports what it
names.

Before Keras reads one, every name in it is held to the layers that covey trains, Keras's own initializers and the like,
and classes that this process has registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from fl_protocol.errors import BundleError, LocalMisuseError
from models.layers.registry import registered_classes

_STAGES = ("channel_scale", "motion_features")
"""The modules of `models.zoo` that register layers of their own."""
_MODELS = ("Sequential", "Functional")
_PARTS = ("keras.initializers", "keras.regularizers", "keras.constraints")
_CODE = ("Lambda", "__lambda__")
"""What a configuration holds as Python bytecode."""


def custom_classes() -> dict[str, type[Any]]:
    """Registered layers that are not Keras's own, by name."""
    for name in _STAGES:
        importlib.import_module(f"models.zoo.{name}")
    return {each.__name__: each for each in registered_classes() if not each.__module__.startswith("keras.")}


def check_config(config: Any, *, source: str) -> None:
    """Refuse a configuration that names what Keras would look up outside of what is known.

    Args:
        config: a model's, as JSON.
        source: where it is from, for errors.

    Raises:
        BundleError: it is no model, or holds code.
        LocalMisuseError: it names a class that is not registered here.
    """
    custom = custom_classes()
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS:
        raise BundleError(f"{source} is no {' or '.join(_MODELS)} model: build it again.")
    layers = {each.__name__ for each in registered_classes()} | {"InputLayer"}
    for each in _objects(config.get("config")):
        name, module = str(each["class_name"]), each.get("module")
        if name in _CODE:
            raise BundleError(
                f"{source} holds a {name.strip('_').title()}, that is program code, which is never run: "
                "use a registered layer instead."
            )
        known = (module == "keras.layers" and name in layers) or module in _PARTS
        if not known and tf.keras.saving.get_registered_object(_registered(each), custom) is None:
            raise LocalMisuseError(
                f"The model uses {_registered(each)}, which is not known here: import the file that registers it with "
                "--custom MODULE.py."
            )


def _registered(each: dict[str, Any]) -> str:
    """The name under which a class or function has to be registered."""
    name = each["config"] if each["class_name"] == "function" else each.get("registered_name")
    return str(name or each["class_name"])


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that a configuration describes, however deep."""
    if isinstance(value, dict):
        if "class_name" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _objects(each)
