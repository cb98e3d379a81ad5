"""Accounts of people and scripts: one role each, and access tokens with scopes that end by themselves (ADR 15)."""
