"""The page at `/`: try the server in a browser. All of it comes from this folder."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

_FOLDER = Path(__file__).parent
_KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
ASSETS = ("page.css", "page.js", "requests.js", "results.js", "icon.svg")
"""Files that the page loads, and nothing else."""


def add_page(app: FastAPI) -> None:
    """Add the page and its assets to an application. They need no key; what the page asks for does."""
    for path, name in (("/", "index.html"), *((f"/assets/{name}", name) for name in ASSETS)):
        route_name = "page" if path == "/" else "assets"
        app.add_api_route(path, _file(name), name=route_name, include_in_schema=False, response_class=Response)
    app.add_api_route("/assets/demo.json", _demo, name="assets", include_in_schema=False, response_class=Response)


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    content, kind = (_FOLDER / name).read_bytes(), _KINDS[Path(name).suffix]

    async def send() -> Response:
        return Response(content, media_type=kind)  # Starlette adds the charset to text

    return send


async def _demo() -> Response:
    return Response(_demo_json(), media_type="application/json")


@cache
def _demo_json() -> bytes:
    """Return the demo's queries and passages; the passage of query i is passage i, and those of no query follow."""
    from kalm_rag.demo_data import load_demo

    corpus = load_demo()
    own = {query: next(iter(corpus.qrels[query])) for query in corpus.queries}
    order = dict.fromkeys([*own.values(), *corpus.passages])
    found = {"queries": list(corpus.queries.values()), "passages": [corpus.passages[name] for name in order]}
    return json.dumps(found).encode()
