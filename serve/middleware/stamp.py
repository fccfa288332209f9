"""Headers that say which weights gave an answer."""

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sampo_ray.run.version_folders import WeightsId


def headers(weights: WeightsId | None) -> dict[str, str]:
    if weights is None:
        return {}
    return {"x-policy-version": str(weights.version), "x-policy-run": weights.run}


class Stamp:
    """ASGI middleware that names the live weights in each answer that does not name its own (errors, model list)."""

    def __init__(self, app: ASGIApp, live: Callable[[], WeightsId | None]) -> None:
        self._app, self._live = app, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in headers(self._live()).items():
                    answer.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, stamped)
