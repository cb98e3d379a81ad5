"""The only code of this package that touches the outside: paho-mqtt, files, log lines (docs/adr/0001)."""
