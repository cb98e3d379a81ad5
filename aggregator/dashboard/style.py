"""The dashboard's own style sheet, served beside NiceGUI's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Response

_TEXT = Path(__file__).with_name("dashboard.css").read_text()
STYLE_PATH = f"/dashboard/style-{hashlib.sha256(_TEXT.encode()).hexdigest()[:16]}.css"


def add_style_to(api: FastAPI) -> None:
    """Add its route, which is no part of the OpenAPI."""

    async def style() -> Response:
        return Response(_TEXT, media_type="text/css", headers={"Cache-Control": "public, max-age=31536000, immutable"})

    api.add_api_route(STYLE_PATH, style, methods=["GET"], include_in_schema=False)
