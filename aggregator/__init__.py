"""What the study operator runs: opens rounds, checks and adds up sealed updates, signs and publishes the next model.

`rounds` and `ingest` are pure; `store` is the one database; `daemon` executes. Nothing here imports the device's code,
the models room or TensorFlow.
"""
