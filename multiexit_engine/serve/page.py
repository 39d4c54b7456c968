"""The built-in page at ``/``: one static file, allowed to run its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import HTMLResponse

PAGE = files("multiexit_engine.serve").joinpath("assets/page.html").read_text("utf-8")

router = APIRouter()


def _policy(page: str) -> str:
    """A content policy that allows the page's inline script, its styles and calls to its server."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


HEADERS = {"Content-Security-Policy": _policy(PAGE), "X-Content-Type-Options": "nosniff"}


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """Modes side by side, each token coloured by the layer that chose it."""
    return HTMLResponse(PAGE, headers=HEADERS)
