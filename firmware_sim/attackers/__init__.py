"""Hostile devices of a simulated fleet: what they train, compute and send. The aggregator knows nothing of it."""
