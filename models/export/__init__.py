"""From a bundle to files that phones and microcontrollers run, each held to the bundle's own inference first.

`data` reads recordings and trained parameters, `convert` makes flatbuffers of a Keras model, `run` and `micro` run them
as their users would, `comparison` measures two models on the same windows, `checked` is the whole way, `c_array` turns
the result into C source. Importing `models.export` or `models.export.data` does not import TensorFlow.
"""
