"""Devices of a simulated fleet that are hostile: what they train, compute and send. The aggregator knows nothing of it."""
