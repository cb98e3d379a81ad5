"""Wearers: when a device is on its charger, unused, and at home. Generated from habits, or read from traces."""
