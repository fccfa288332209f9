"""The page: static files of the package, under relative addresses so that any route prefix will do."""

from importlib import resources
from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from sampo_ray.serve.errors import ApiError

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def load_assets() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the page's files by name."""
    files = [file for file in (resources.files(__package__) / "page").iterdir() if file.is_file()]
    typed = {file.name: TYPES.get("." + file.name.rpartition(".")[2]) for file in files}
    return {file.name: (file.read_bytes(), kind) for file in files if (kind := typed[file.name])}


class PageRoutes:
    """Handlers of `/` and `/page/...`. There is no data in them: no key is needed."""

    assets: dict[str, tuple[bytes, str]]

    async def page(self) -> Response:
        return self._asset("index.html")

    async def page_below(self, request: Request) -> Response:
        """The page at its route prefix without a slash: its relative addresses hold only behind one."""
        return RedirectResponse(f"{request.url.path.rpartition('/')[2]}/")

    async def page_asset(self, name: str) -> Response:
        if name not in self.assets:
            raise ApiError(404, "the page has no file of that name")
        return self._asset(name)

    def _asset(self, name: str) -> Response:
        content, kind = self.assets[name]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


PAGE_ROUTES: dict[str, Any] = {
    "page": lambda app: app.get("/"),
    "page_below": lambda app: app.get(""),
    "page_asset": lambda app: app.get("/page/{name}"),
}
