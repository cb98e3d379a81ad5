"""A device's real-time clock: drift, jumps, time zone, correction by NTP."""
