"""Device-level privacy: what happened in rounds, who looks at it, what it costs, and when a task has to stop. Pure.

In this order: `events` (what happened), `adversaries` (which of the noise they do not know), `mechanisms` (what one
release costs), `composition` (which rounds one device can have been in), `accounting` (all of it), `filter` (a budget
that holds), and beside them `record_level` and `planning`.

Neighbours: one device's whole update of every round, or zeros in its place. That a device takes part, and in which
rounds, is public: it is not protected (docs/device-level-privacy.md).
"""
