"""What operating a study costs: the audit log, and what operators wait for."""
