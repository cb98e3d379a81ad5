"""The device's ports on real hardware; one outside library a file."""
