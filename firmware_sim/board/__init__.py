"""The virtual board: battery, heat, speed and flash wear of a device, integrated exactly between its changes."""
