"""Devices that join by themselves: tokens, the register of enrolments, and the desk that answers requests (ADR 15)."""
