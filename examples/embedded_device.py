"""A device inside a program of your own: it stores labelled windows, and takes part when the wearer's rules allow it.

python examples/embedded_device.py device.toml
"""

import sys
import threading

import numpy as np

from device_client import Device

with Device.open(sys.argv[1]) as device:
    device.grant(device.config.studies[0].study)  # once, when the wearer has agreed
    for label in range(3):  # your sensor: windows as the model takes them
        device.add(np.random.default_rng(label).normal(size=(128, 6)), label)
    threading.Timer(10, device.stop).start()
    device.run()  # or device.step() in a loop of your own
    print(device.status().studies[0].doing)
