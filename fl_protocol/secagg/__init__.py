"""Secure aggregation: a sum of many updates that nobody sees one of. Pure; `reference_round` is the whole of it."""
