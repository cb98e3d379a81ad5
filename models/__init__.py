"""Build, convert and package models that train on a device; the only room that imports TensorFlow.

The way through: `specs` says what a model is, `layers` knows how one layer runs forward, backward and per example,
`network` chains them over one flat parameter vector, `steps` holds the three pure functions of a trainable graph,
`convert` turns those into one ``.tflite``, `template` makes the inference-only file, `build` signs the bundle.
`reference` is the oracle: the same models in TensorFlow's own operators with per-example automatic differentiation.

Importing `models`, `models.specs`, `models.catalog` or `models.cli` does not import TensorFlow.
"""
