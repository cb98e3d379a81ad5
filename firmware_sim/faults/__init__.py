"""Faults of a simulated fleet: what goes wrong, when, and to whom."""
