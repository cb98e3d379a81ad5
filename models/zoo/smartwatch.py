"""What a smartwatch window is: the input and labels that `watch_cnn` and `watch_features` share.

The labels are the seven shoulder exercises of Burns et al. 2018 (arXiv 1802.01489): pendulum, abduction, forward
elevation, internal rotation, external rotation, trapezius extension, upright row.
"""

from __future__ import annotations

from fl_protocol.model_manifest import InputSchema, LabelSchema

WINDOW = InputSchema(
    shape=(128, 6),
    channels=("ax", "ay", "az", "wx", "wy", "wz"),
    units=("g", "g", "g", "rad/s", "rad/s", "rad/s"),
    sampling_rate_hz=50.0,
)
"""2.56 s of acceleration (gravity included) and angular rate."""

EXERCISES = LabelSchema(kind="class", names=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"))

RECORDINGS = "Shoulder exercises of 10 people on both wrists, shipped with seglearn; BSD-3-Clause (arXiv 1802.01489)."
