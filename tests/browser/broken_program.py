"""``covey-aggregator`` with modules broken on purpose: `python -m tests.browser.broken_program CHANGES ...`."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from tests.enrolments import broken_copy


def main() -> None:
    """Take the place of each changed module before anybody imports it, and run the command."""
    changes: dict[str, list[tuple[str, str]]] = {}
    for module, right, wrong in json.loads(sys.argv.pop(1)):
        changes.setdefault(module, []).append((right, wrong))
    for module, pairs in changes.items():
        copy = broken_copy(module, *pairs)
        package, _, name = module.rpartition(".")
        sys.modules[module] = copy
        setattr(import_module(package), name, copy)
    import_module("aggregator.cli").main()


if __name__ == "__main__":
    main()
