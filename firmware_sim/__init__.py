"""Fleets: real device daemons on recorded or simulated wearers, and the runner that starts and watches them."""
