"""Tests of `aggregator.privacy`."""
