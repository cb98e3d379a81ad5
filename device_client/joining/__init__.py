"""How a device joins a study by itself, and gets further names before its last one ends (ADR 15)."""
