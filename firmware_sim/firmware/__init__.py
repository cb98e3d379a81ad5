"""A device's firmware: two slots, updates in waves, rollback, watchdog."""
