"""Errors of the HTTP API: a status, a code for programs, one sentence for people (in the manner of RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import Response

from aggregator.api.answers import Fault, Problem
from aggregator.errors import AggregatorError

PROBLEM_TYPE = "application/problem+json"
STATUSES: Mapping[int, str] = {
    401: "there is no token, or it does not hold",
    403: "the token may not do this",
    404: "there is no such thing",
    405: "this cannot be done here",
    409: "it is not possible as things stand; `code` says why",
    412: "somebody has changed it meanwhile: look again",
    413: "the request is too long",
    422: "the request is not as described here",
    429: "too many requests; `Retry-After` says when to come again",
    503: "the database cannot be reached, or too much is asked at once; come again",
}
"""Every status that is no success, in words."""


class ProblemError(AggregatorError):
    """A request that is not carried out.

    Args:
        status: one of `STATUSES`.
        code: for programs.
        detail: one sentence.
        retry_s: after how many seconds to come again.
        faults: what is wrong in the request.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, retry_s: int | None = None, faults: tuple[Fault, ...] = ()
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.retry_s, self.faults = status, code, retry_s, faults


def problem(error: ProblemError) -> Response:
    """An error as an answer."""
    headers: dict[str, str] = {}
    if error.retry_s is not None:
        headers["Retry-After"] = str(error.retry_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="covey"'
    body = msgspec.json.encode(Problem(code=error.code, detail=str(error), faults=error.faults))
    return Response(body, error.status, headers=headers, media_type=PROBLEM_TYPE)


def missing(what: str) -> ProblemError:
    """There is none."""
    return ProblemError(404, "not_found", f"there is no {what}")
