"""The Flower app of benchmarks/device_footprint.py."""
