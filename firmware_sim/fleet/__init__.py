"""A fleet in virtual time (ADR 14): a hub with the real aggregator, shards of real devices, and what binds them."""
