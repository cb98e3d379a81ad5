"""The audit log: what was done, in a Merkle tree that cannot be quietly edited (ADR 15)."""
