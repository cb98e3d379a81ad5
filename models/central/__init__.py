"""Central training: a publisher's DP-SGD on data in one place, by the code that devices run (ADR 7).

`plan` says how long, with how much noise and at what epsilon; `training` is the loop; `checkpoints` keeps it and its
count of noisy sums on disk; `data` reads recordings; `release` signs what came out; `tf_privacy` trains the same model
with TensorFlow Privacy, to compare. Only `tf_privacy` needs TensorFlow.
"""
