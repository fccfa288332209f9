"""The page's files: which are served, where, and what they may not contain."""

import asyncio
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray.serve._private.thirdparty.get_asgi_route_name import extract_route_patterns

from sampo_ray.serve import errors
from sampo_ray.serve.routes.page import PAGE_ROUTES, PageRoutes, RedirectToPage, load_assets


def served(path: str, prefix: str = "") -> httpx.Response:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(RedirectToPage)
    routes = PageRoutes()
    routes.assets = load_assets()
    for name, route in PAGE_ROUTES.items():
        route(app)(getattr(routes, name))
    assert all(pattern.path for pattern in extract_route_patterns(app)), "Ray Serve's proxy takes no empty pattern"

    async def ask() -> httpx.Response:
        transport: Any = httpx.ASGITransport(app, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(prefix + path)

    return asyncio.run(ask())


@pytest.mark.parametrize("prefix", ["", "/run-a", "/outer/run-a"])
def test_the_page_is_found_below_any_prefix(prefix: str) -> None:
    page = served("/", prefix)
    assert page.headers["content-type"].startswith("text/html")
    for address in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert served(f"/{address}", prefix).status_code == 200
    if prefix:
        moved = served("", prefix)
        assert (moved.status_code, moved.headers["location"]) == (307, "run-a/")


@pytest.mark.parametrize("path", ["/page/../playground.py", "/page/%2e%2e%2fplayground.py", "/page/x.js", "/page/"])
def test_nothing_else_is_served(path: str) -> None:
    assert served(path).status_code in (307, 404)
    assert "class" not in served(path).text


def test_the_files_need_no_other_site_and_none_of_what_their_policy_forbids() -> None:
    assets = load_assets()
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= set(assets)
    for name, (content, kind) in assets.items():
        text = content.decode().replace("http://www.w3.org/", "")
        assert "://" not in text, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        if kind == "text/html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text)
        assert len(text.splitlines()) < 500
