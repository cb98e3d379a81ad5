"""What runs on a wearer's device: it trains on recordings that never leave it, and charges for every release first.

`session` is the pure state machine; `daemon` executes what it asks through `ports`; `adapters` hold one outside library
each. Nothing here imports the aggregator, the models room or TensorFlow.
"""
