"""What operating a study costs: so far the audit log, of a million entries (`benchmarks.operations.audit_log`).

python -m benchmarks.operations
python -m benchmarks.operations --entries 100000 --json
"""

from __future__ import annotations

import json
import sys

from benchmarks.command import parser
from benchmarks.operations import audit_log


def main() -> None:
    """Measure, and print."""
    command = parser("operations", __doc__)
    command.add_argument("--entries", type=int, default=1_000_000, help="of the audit log (default 1000000)")
    arguments = command.parse_args()
    if arguments.entries < 1:
        command.error("--entries: at least 1")
    result = audit_log.measure(arguments.entries)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for key, value in result.items():
        print(f"{key:<28}{value}")


if __name__ == "__main__":
    main()
