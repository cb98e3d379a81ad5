"""A layer of one's own: a trained weight per channel. `covey-model build` checks its gradients before it signs."""

import tensorflow as tf

from models.layers import Context, Parameter, PerExample, register_layer


@tf.keras.saving.register_keras_serializable(package="example")
class ChannelGain(tf.keras.layers.Layer):
    """y = x·gain, in Keras."""

    def build(self, input_shape):
        self.gain = self.add_weight("gain", (input_shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.gain


@register_layer(ChannelGain)
class ChannelGainLayer:
    """The same with a gradient per example, in operators that every TFLite runtime has."""

    def __init__(self, layer: ChannelGain, context: Context):
        self.output_shape = context.input_shape
        self.parameters = (Parameter("gain", context.input_shape[-1:]),)
        self.norm_methods = {"gain": "materialised"}
        self._copies = context.copies

    def forward(self, weights, x):
        return x * weights[0], x

    def backward(self, weights, saved, output_gradient):
        inner_axes = list(range(1, len(self.output_shape)))
        each = tf.reduce_sum(output_gradient * saved, inner_axes)
        return (output_gradient * weights[0],), (PerExample(each, copies=self._copies, role="gain"),)


def make_model():
    """A model that uses it."""
    model = tf.keras.Sequential(
        [
            tf.keras.Input((64, 3)),
            ChannelGain(name="gain"),
            tf.keras.layers.Conv1D(8, 5, activation="relu"),
            tf.keras.layers.GlobalMaxPooling1D(),
            tf.keras.layers.Dense(4),
        ],
        name="own_layer",
    )
    model.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
