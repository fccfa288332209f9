"""ASGI middleware that every request passes: keys, limits, headers. It imports no route and never parses a body."""
