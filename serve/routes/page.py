"""The page: static files of the package. Their links are relative, so that they work under any route prefix."""

from collections.abc import Callable
from importlib import resources
from os.path import splitext

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sampo_ray.serve.errors import ApiError

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def load_assets() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the page's files by name."""
    files = (resources.files("sampo_ray.serve") / "page").iterdir()
    return {file.name: (file.read_bytes(), TYPES[end]) for file in files if (end := splitext(file.name)[1]) in TYPES}


class PageRoutes:
    """Handlers of `/` and `/page/...`. The files hold no data, so they need no key."""

    assets: dict[str, tuple[bytes, str]]

    async def page(self) -> Response:
        return self._asset("index.html")

    async def page_asset(self, name: str) -> Response:
        if name not in self.assets:
            raise ApiError(404, "the page has no file of that name")
        return self._asset(name)

    def _asset(self, name: str) -> Response:
        content, kind = self.assets[name]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


PAGE_ROUTES: dict[str, Callable[[FastAPI], object]] = {
    "page": lambda app: app.get("/"),
    "page_asset": lambda app: app.get("/page/{name}"),
}


class RedirectToPage:
    """ASGI middleware that redirects the bare route prefix to the page, with the slash that its links need.

    The redirect is relative, since a proxy in between may use another name, scheme or prefix. It is no route, because
    Ray Serve's proxy cannot match the pattern of an empty path and would count all requests as one route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")
        if scope["type"] == "http" and scope["method"] == "GET" and prefix and scope["path"] == prefix:
            await RedirectResponse(f"{prefix.rpartition('/')[2]}/")(scope, receive, send)
        else:
            await self._app(scope, receive, send)
