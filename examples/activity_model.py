"""An ordinary Keras model that covey makes trainable on a device, under differential privacy.

covey-model build examples/activity_model.py:make_model --out activity.covey --key publisher.key \\
        --labels PEN,ABD,FEL,IR,ER,TRAP,ROW --channels ax,ay,az,wx,wy,wz \\
        --units g,g,g,rad/s,rad/s,rad/s --sampling-rate 50
"""

import tensorflow as tf


def make_model():
    """Windows of 128 samples from an accelerometer and a gyroscope, seven exercises."""
    layers = tf.keras.layers
    inputs = x = tf.keras.Input((128, 6))
    x = layers.Conv1D(16, 5, strides=2, padding="same", activation="relu", name="conv")(x)
    shortcut = x
    x = layers.SeparableConv1D(16, 5, padding="same", activation="relu", name="separable")(x)
    x = layers.Add(name="residual")([x, shortcut])
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    outputs = layers.Dense(7, activation="softmax", name="exercise")(x)
    model = tf.keras.Model(inputs, outputs, name="activity")
    model.compile(loss="sparse_categorical_crossentropy")
    return model
