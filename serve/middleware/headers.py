"""Headers on every answer: what a browser may do with it, and which weights gave it."""

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sampo_ray.run.versions import WeightsId

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def version_headers(weights: WeightsId | None) -> dict[str, str]:
    return {} if weights is None else {"x-policy-version": str(weights.version), "x-policy-run": weights.run}


class ResponseHeaders:
    """ASGI middleware that adds the headers that `defaults` returns to answers which do not set them themselves."""

    def __init__(self, app: ASGIApp, defaults: Callable[[], dict[str, str]]) -> None:
        self._app, self._defaults = app, defaults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._defaults().items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
