"""What the devices of a fleet are made of: one TOML file a kind of hardware, with a source for every figure."""
