"""Does the HTTP API answer as it declares, whatever it is asked: cases that schemathesis makes from its OpenAPI.

Each route gets its share of cases, half of them as the OpenAPI describes and half not. Seven in ten values in paths are
replaced by names that are in the database, or most cases would end at a 404; tokens are an admin's mostly, and
sometimes a viewer's, or none. The server is the real one, on loopback, over a seeded SQLite file. A case fails with a
status of 500 or more, a status, content type or header that is not declared, or a body that is not as its schema says.

    python -m benchmarks.operations.api_cases --cases 20000
    python -m benchmarks.operations.api_cases --cases 20000 --json
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.command import parser
from tests.aggregator.api.seeded_study import OPEN, SeededStudy
from tests.aggregator.api.served import Desk, Served, served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
KNOWN_SHARE = 0.7
SPARE_TASKS = 20
MOST_TOLD = 20


@dataclass
class Cases:
    """What came of cases.

    Args:
        server: that is asked.
        random: chooses names and tokens.
    """

    server: Served
    random: random.Random
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        study = self.server.desk.study
        self._tokens: list[str | None] = [*[study.tokens["admin"]] * 8, study.tokens["viewer"], None]
        spare = [study.add_token("operator").split("_")[1] for _ in range(50)]
        numbers: list[object] = [*range(15), 2**31 - 1]
        self._known: dict[str, list[Any]] = {
            "task": [OPEN, "masked", *(f"spare-{number}" for number in range(SPARE_TASKS))],
            "device": [f"w-{number:05}" for number in range(study.devices)],
            "account": ["admin", "operator", "nobody"],
            "token": spare,
            "tag": ["released", "good"],
            "number": numbers,
            "order": numbers,
            "version": numbers,
        }
        self._session = requests.Session()

    def ask(self, case: Case) -> None:
        """One case."""
        for name in case.path_parameters or {}:
            if self.random.random() < KNOWN_SHARE:
                case.path_parameters[name] = self.random.choice(self._known[name])
        token = self.random.choice(self._tokens)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            response = case.call(
                f"http://127.0.0.1:{self.server.port}", session=self._session, headers=headers, timeout=60
            )
        except ValueError:  # what HTTP cannot carry, such as a header with a line's end; requests refuses it
            return
        self.count += 1
        self.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            self.failures += [f"{case.method} {case.path}: {one}" for one in group.exceptions]


def run_cases(server: Served, cases: int, *, seeded: int = 1) -> Cases:
    """Ask until there were as many cases as wanted, each route as often as the others.

    Args:
        server: over a study with tasks `spare-0` and so on.
        cases: at least so many.
        seeded: decides all of them.
    """
    _, _, document = server.ask("GET", "/v1/openapi.json")
    found = Cases(server, random.Random(seeded))  # noqa: S311 - cases, not keys
    operations = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations()]
    turn = 0
    while found.count < cases:
        each = max(2, -(-(cases - found.count) // (2 * len(operations))))
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _ask_about(operation.as_strategy(generation_mode=mode), found, each, seeded=seeded + turn)
        turn += 1
    return found


def _ask_about(strategy: Any, found: Cases, each: int, *, seeded: int) -> None:
    """Some cases of one route."""
    limits = settings(
        max_examples=each,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @seed(seeded)
    @limits
    @given(case=strategy)
    def ask(case: Case) -> None:
        found.ask(case)

    with suppress(Unsatisfiable):  # a route that is told nothing cannot be told anything wrong
        ask()


def measure(cases: int, *, seeded: int = 1) -> dict[str, Any]:
    """Run cases against a study of its own; what came of them, for JSON."""
    with tempfile.TemporaryDirectory() as folder:
        study = SeededStudy(f"sqlite:///{Path(folder) / 'study.db'}", masked_rounds=2)
        for number in range(SPARE_TASKS):
            study.add_task(f"spare-{number}", 3)
        began_s = time.monotonic()
        with served(Desk(study)) as server:
            found = run_cases(server, cases, seeded=seeded)
        study.store.close()
    return {
        "cases": found.count,
        "server_errors": sum(times for status, times in found.statuses.items() if status >= 500),
        "failures": len(found.failures),
        "first_failures": found.failures[:MOST_TOLD],
        "statuses": {str(status): times for status, times in sorted(found.statuses.items())},
        "seconds": round(time.monotonic() - began_s, 1),
    }


def main() -> None:
    """Run, print, and fail where a case did."""
    command = parser("operations.api_cases", __doc__)
    command.add_argument("--cases", type=int, default=20_000, help="at least so many (default 20,000)")
    command.add_argument("--seed", type=int, default=1, help="decides all cases (default 1)")
    arguments = command.parse_args()
    result = measure(arguments.cases, seeded=arguments.seed)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(f"{result['cases']} cases, {result['failures']} failed, {result['server_errors']} server errors")
        print(f"answers by status: {result['statuses']}; {result['seconds']} s")
        for failure in result["first_failures"]:
            print(failure)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
