"""What operating a study costs: the audit log, the HTTP API, enrolment, revocation."""
