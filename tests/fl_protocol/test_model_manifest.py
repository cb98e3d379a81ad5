"""Labels as a model takes them, and what is said when they do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_protocol.model_manifest import LabelSchema, label_array, label_problem

CLASSES = LabelSchema("class", ("a", "b", "c"))
FLAGS = LabelSchema("binary", ("fever", "cough"))
VALUES = LabelSchema("value", ("rate",), ("1/min",), 5.0)
ITSELF = LabelSchema("input", tolerance=0.1)


def test_classes_are_whole_numbers() -> None:
    array = label_array(np.array([0.0, 2.0]), 2, label=CLASSES)
    assert array.dtype == np.int32
    assert array.tolist() == [0, 2]
    with pytest.raises(ValueError, match="not whole"):
        label_array(np.array([0.5, 2.0]), 2, label=CLASSES)
    with pytest.raises(KeyError):
        label_array(None, 2, label=CLASSES)


def test_values_are_a_matrix_and_an_autoencoder_needs_none() -> None:
    assert label_array([70, 80], 2, label=VALUES).tolist() == [[70.0], [80.0]]
    assert label_array([[1, 0], [0, 1]], 2, label=FLAGS).dtype == np.float32
    assert label_array(None, 3, label=ITSELF).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("y", "label", "problem"),
    [
        (np.array([0, 2], np.int32), CLASSES, ""),
        (np.array([0, 3], np.int32), CLASSES, "the labels run from 0 to 3, the model knows 0 to 2"),
        (np.array([-1, 0], np.int32), CLASSES, "from -1"),
        (np.array([[1.0, 0.0]], np.float32), FLAGS, ""),
        (np.array([[1.0, 0.5]], np.float32), FLAGS, "other than 0 and 1"),
        (np.array([[1.0]], np.float32), FLAGS, "takes 2 numbers an example: fever, cough"),
        (np.array([[70.0]], np.float32), VALUES, ""),
        (np.array([[np.nan]], np.float32), VALUES, "not finite"),
        (np.zeros(3, np.int32), ITSELF, ""),
        (np.zeros((0, 5), np.float32), VALUES, ""),
    ],
)
def test_what_is_wrong_with_labels_is_said(y: Any, label: LabelSchema, problem: str) -> None:
    found = label_problem(y, label)
    assert (problem in found) if problem else not found
