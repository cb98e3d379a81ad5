"""What running a study costs: the HTTP API, the dashboard, enrolment, revocation, the audit log."""
