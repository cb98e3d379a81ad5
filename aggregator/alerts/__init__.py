"""What an operator is told of without asking: alarms as entries of the audit log, and webhooks that follow the log."""
